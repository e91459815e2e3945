"""FedSA-LoRA: A is shared and averaged, every client keeps its own B.

Guo et al., "Selective Aggregation for Low-Rank Adaptation in Federated Learning", ICLR 2025: A learns what is
general, B what is a client's own.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from pomona.federation.strategies.fedavg import FedAvg
from pomona.federation.strategies.protocol import ServerState
from pomona.federation.update import Part, Update


@dataclass(frozen=True)
class FedSALoRA:
    """Sends A and averages it by rows; B never leaves."""

    @property
    def shares(self) -> Part:
        """A alone."""
        return "lora_A"

    def init(self, shared: Mapping[str, Tensor]) -> ServerState:
        """There is nothing to remember."""
        return ServerState(shared)

    def aggregate(self, state: ServerState, updates: Iterable[Update]) -> ServerState:
        """Aggregate as FedAvg does."""
        return FedAvg().aggregate(state, updates)
