"""What a planner is, and what it sees."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch import Tensor

from pomona.reconstruction.calibrate import ChannelStats
from pomona.reconstruction.ffn import DenseModel
from pomona.reconstruction.plan import ExpertPlan
from pomona.reconstruction.scores import Score


@dataclass(frozen=True)
class Calibration:
    """The dense model with every domain's windows [B, T] and channel statistics per layer."""

    dense: DenseModel = field(repr=False)
    windows: Mapping[str, Tensor] = field(repr=False)
    stats: Mapping[str, Sequence[ChannelStats]] = field(repr=False)


@runtime_checkable
class Planner(Protocol):
    """Deals the channels of every layer to experts."""

    @property
    def divides(self) -> bool:
        """Whether every channel goes to exactly one expert or to the shared one: nothing is pruned.

        The experts' outputs add up to the dense FFN's, so they are to keep their channels and columns.
        """
        ...

    def shared_channels(self, channels: int, experts: int, width: int) -> int:
        """Return how many of a layer's channels serve every token, beside `width` for each expert.

        Raises `PomonaError` for sizes that cannot be dealt.
        """
        ...

    def __call__(
        self,
        calibration: Calibration,
        groups: Sequence[Sequence[str]],
        score: Score,
        width: int,
        active: int,
        seed: int,
    ) -> ExpertPlan:
        """Return `width` channels per layer and expert, one expert per group of domains.

        `active` experts will serve a token. Raises `PomonaError` as `shared_channels` does.
        """
        ...
