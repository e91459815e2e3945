"""SCAFFOLD: every client corrects its gradient by how its own differs from everybody's.

Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", ICML 2020. A step
goes along g_k + c − c_k. Afterwards c_k becomes the mean of the round's own gradients g_k; with SGD that is the
paper's option II, c_k − c + (x − y_k) / (K·η), to the letter, and it keeps its meaning with AdamW, whose
steps are not in units of gradients. The server adds |S| / N of the mean change to c.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pomona.errors import PomonaError
from pomona.federation.strategies.fedavg import weighted_mean
from pomona.federation.strategies.protocol import ServerState
from pomona.federation.update import Part, Update

_CONTROL = "control."


@dataclass(frozen=True)
class Scaffold:
    """Sends the adapter and the change of its control variate, twice the bytes of FedAvg.

    Attributes:
        fraction: Share of the clients that takes part in a round, as in the recipe.
    """

    fraction: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise PomonaError(f"SCAFFOLD fraction {self.fraction} is not between 0 and 1")

    @property
    def shares(self) -> Part:
        """The whole adapter."""
        return "adapter"

    def birth(self, shared: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return c_k = 0."""
        return {f"{_CONTROL}{name}": torch.zeros_like(value) for name, value in shared.items()}

    def correction(
        self, server: Mapping[str, Tensor], own: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return c − c_k by the name of the shared tensor."""
        return {n.removeprefix(_CONTROL): value - own[n] for n, value in server.items()}

    def report(
        self, own: Mapping[str, Tensor], gradient: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the new c_k and its change."""
        new = {f"{_CONTROL}{name}": value for name, value in gradient.items()}
        return new, {name: value - own[name] for name, value in new.items()}

    def init(self, shared: Mapping[str, Tensor]) -> ServerState:
        """Return c = 0 beside the shared tensors."""
        return ServerState(shared, self.birth(shared))

    def aggregate(self, state: ServerState, updates: Iterable[Update]) -> ServerState:
        """Return the mean of the adapters by rows and c moved by the plain mean of the changes."""
        sums = dict(state.memory)
        changes = {name: torch.zeros_like(value) for name, value in sums.items()}
        clients = 0

        def adapters() -> Iterable[Update]:
            nonlocal clients
            for update in updates:
                clients += 1
                for name in changes:
                    changes[name] += update.shared[name]
                own = {n: v for n, v in update.shared.items() if n not in changes}
                yield Update(update.client, update.rows, own)

        shared = weighted_mean(adapters())
        if not clients:
            return state
        moved = {n: c + self.fraction * changes[n] / clients for n, c in sums.items()}
        return ServerState(shared, moved)
