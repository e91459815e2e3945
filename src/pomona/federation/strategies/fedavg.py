"""FedAvg: the mean of the clients' tensors, weighted by their rows.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS
2017. On LoRA it averages A and B separately, as FLEx does; mean(B) · mean(A) ≠ mean(B · A).
"""

from collections.abc import Iterable, Iterator, Mapping
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
    """Return Σ rows · θ / Σ rows, holding one update at a time; empty without updates."""
    return mean_of(_weighed(updates))


def _weighed(updates: Iterable[Update]) -> Iterator[tuple[float, Mapping[str, Tensor]]]:
    for update in updates:
        weighed = update.rows, update.shared
        del update  # while the next one is made it is nobody's
        yield weighed
        del weighed


def mean_of(weighed: Iterable[tuple[float, Mapping[str, Tensor]]]) -> dict[str, Tensor]:
    """Return Σ weight · θ / Σ weight of (weight, tensors), holding one at a time; empty without any.

    Sums run in float64, so that the order of the clients changes nothing that float32 can hold.
    """
    sums: dict[str, Tensor] = {}
    kinds: dict[str, torch.dtype] = {}
    weights = 0.0
    for weight, tensors in weighed:
        weights += weight
        for name in tensors:
            kinds[name] = tensors[name].dtype
            weighted = tensors[name].double() * weight
            sums[name] = sums[name].add_(weighted) if name in sums else weighted
        del tensors
    return {name: (sums.pop(name) / weights).to(kinds[name]) for name in list(sums)}
