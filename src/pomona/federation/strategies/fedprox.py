"""FedProx: FedAvg whose clients are held near what the server sent.

Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020. FLEx compares with
μ = 0.01. With μ = 0 it equals FedAvg bit for bit.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pomona.errors import PomonaError
from pomona.federation.strategies.fedavg import FedAvg
from pomona.federation.strategies.protocol import ServerState
from pomona.federation.update import Part, Update
from pomona.shapes import PerClient


@dataclass(frozen=True)
class FedProx:
    """Adds μ/2 · ‖θ − θ_server‖² over the shared tensors to every client's loss.

    Attributes:
        mu: μ.
    """

    mu: float = 0.01

    def __post_init__(self) -> None:
        if self.mu < 0:
            raise PomonaError(f"FedProx mu {self.mu} is negative; use 0 or more")

    @property
    def shares(self) -> Part:
        """The whole adapter."""
        return "adapter"

    def penalty(self, adapter: Mapping[str, Tensor], anchor: Mapping[str, Tensor]) -> PerClient:
        """Return each client's proximal term [C]."""
        distance_C = [
            (value - anchor[name]).flatten(1).square().sum(1) for name, value in adapter.items()
        ]
        return self.mu / 2 * torch.stack(distance_C).sum(0)

    def init(self, shared: Mapping[str, Tensor]) -> ServerState:
        """FedProx remembers nothing."""
        return ServerState(shared)

    def aggregate(self, state: ServerState, updates: Iterable[Update]) -> ServerState:
        """Aggregate as FedAvg does."""
        return FedAvg().aggregate(state, updates)
