"""Coordinate-wise median and trimmed mean: a few wild clients move no coordinate far.

Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", ICML 2018,
definitions 1 and 2. Every client counts the same: a weight by rows would be what a liar states.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pomona.errors import PomonaError
from pomona.federation.strategies.protocol import ServerState
from pomona.federation.update import Part, Update


@dataclass(frozen=True)
class Median:
    """Takes the median of every coordinate; of an even number of clients the mean of the middle two."""

    @property
    def shares(self) -> Part:
        """The whole adapter."""
        return "adapter"

    def init(self, shared: Mapping[str, Tensor]) -> ServerState:
        """There is nothing to remember."""
        return ServerState(shared)

    def aggregate(self, state: ServerState, updates: Iterable[Update]) -> ServerState:
        """Return the medians; without updates the state stays as it was."""
        sent = list(updates)
        return ServerState(mean_without_extremes(sent, (len(sent) - 1) // 2)) if sent else state


@dataclass(frozen=True)
class TrimmedMean:
    """Averages every coordinate without the clients at either end.

    Of n clients ⌊trim · n⌋ are left out at either end.

    Attributes:
        trim: Share of the clients that is left out at either end.
    """

    trim: float = 0.25

    def __post_init__(self) -> None:
        if not 0 <= self.trim < 0.5:
            raise PomonaError(
                f"TrimmedMean trim {self.trim} is not in [0, 0.5); use the share of clients that may "
                "be wrong, for example 0.25"
            )

    @property
    def shares(self) -> Part:
        """The whole adapter."""
        return "adapter"

    def init(self, shared: Mapping[str, Tensor]) -> ServerState:
        """There is nothing to remember."""
        return ServerState(shared)

    def aggregate(self, state: ServerState, updates: Iterable[Update]) -> ServerState:
        """Return the trimmed means; without updates the state stays as it was."""
        sent = list(updates)
        cut = math.floor(self.trim * len(sent) + 1e-9)  # 0.29 · 100 is a little less than 29
        return ServerState(mean_without_extremes(sent, cut)) if sent else state


def mean_without_extremes(updates: Sequence[Update], cut: int) -> dict[str, Tensor]:
    """Return every coordinate's mean without its `cut` smallest and `cut` largest values.

    A value that is no number counts among the largest. Summed in sorted order in float64, so that the
    order of the clients changes nothing.
    """
    result: dict[str, Tensor] = {}
    for name, like in updates[0].shared.items():
        values_C = torch.stack([update.shared[name] for update in updates]).double()
        kept_C = values_C.sort(dim=0).values[cut : len(updates) - cut]
        result[name] = kept_C.mean(0).to(like.dtype)
    return result
