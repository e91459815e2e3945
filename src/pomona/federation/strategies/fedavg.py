"""FedAvg: the mean of the clients' tensors, weighted by their rows.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS
2017. On LoRA it averages A and B separately, as FLEx does; mean(B) · mean(A) ≠ mean(B · A).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pomona.federation.strategies.protocol import ServerState
from pomona.federation.update import Part, Update


@dataclass(frozen=True)
class FedAvg:
    """Sends the adapter and averages it by rows."""

    @property
    def shares(self) -> Part:
        """The whole adapter."""
        return "adapter"

    def init(self, shared: Mapping[str, Tensor]) -> ServerState:
        """FedAvg remembers nothing."""
        return ServerState(shared)

    def aggregate(self, state: ServerState, updates: Iterable[Update]) -> ServerState:
        """Return the weighted mean; without updates the state stays as it was."""
        return ServerState(weighted_mean(updates) or state.shared)


def weighted_mean(updates: Iterable[Update]) -> dict[str, Tensor]:
    """Return Σ rows · θ / Σ rows, holding one update at a time; empty without updates.

    Sums run in float64, so that the order of the clients changes nothing that float32 can hold.
    """
    sums: dict[str, Tensor] = {}
    kinds: dict[str, torch.dtype] = {}
    rows = 0
    for update in updates:
        rows += update.rows
        for name, value in update.shared.items():
            kinds[name] = value.dtype
            weighted = value.double() * update.rows
            sums[name] = sums[name] + weighted if name in sums else weighted
    return {name: (total / rows).to(kinds[name]) for name, total in sums.items()}
