"""FFA-LoRA: A stays as it was born, B is trained and averaged, so that the mean of products is exact.

Sun et al., "Improving LoRA in Privacy-preserving Federated Learning", ICLR 2024. With one A for all,
mean(B) · A = mean(B · A); half as much is sent.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from pomona.federation.strategies.fedavg import weighted_mean
from pomona.federation.strategies.protocol import ServerState
from pomona.federation.update import Part, Update


@dataclass(frozen=True)
class FFALoRA:
    """Freezes A; averages B by rows."""

    @property
    def shares(self) -> Part:
        """The whole adapter is the same for everybody, of which only B travels."""
        return "adapter"

    @property
    def freezes(self) -> Part:
        """A."""
        return "lora_A"

    def init(self, shared: Mapping[str, Tensor]) -> ServerState:
        """There is nothing to remember."""
        return ServerState(shared)

    def aggregate(self, state: ServerState, updates: Iterable[Update]) -> ServerState:
        """Return A as it was and the weighted mean of B."""
        return ServerState({**state.shared, **weighted_mean(updates)})
