"""Every expert keeps what matters most to its domains (DIVE, arXiv 2506.09351, section 3.2)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pomona.errors import PomonaError
from pomona.reconstruction.calibrate import pool
from pomona.reconstruction.ffn import top_channels
from pomona.reconstruction.plan import ExpertPlan
from pomona.reconstruction.planners.protocol import Calibration
from pomona.reconstruction.scores import Score, score_layers


@dataclass(frozen=True)
class TopChannels:
    """Pools a group's statistics, scores anew and keeps the best channels of every layer.

    Routing weights sum to one, so a channel that all experts keep gives the same function in a shared
    expert at a fraction of the size.

    Attributes:
        shared: Share of dense channels hoisted into one ungated expert that serves every token: the
            channels that most experts would keep.
    """

    shared: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.shared < 1:
            raise PomonaError(f"shared {self.shared} is not a share; use 0 or for example 0.25")

    @property
    def divides(self) -> bool:
        """Several experts may keep a channel, or none."""
        return False

    def shared_channels(self, channels: int, experts: int, width: int) -> int:
        """Return the share; raises `PomonaError` where the experts' own channels leave no room for it."""
        size = round(self.shared * channels)
        if size + width > channels:
            raise PomonaError(
                f"{size} shared and {width} own channels are more than the {channels} that a layer "
                "has; make keep or shared smaller"
            )
        return size

    def __call__(
        self,
        calibration: Calibration,
        groups: Sequence[Sequence[str]],
        score: Score,
        width: int,
        active: int,
        seed: int,
    ) -> ExpertPlan:
        """Return the plan; `width` channels are an expert's own, beside the shared ones."""
        dense = calibration.dense
        size = self.shared_channels(dense.channels, len(groups), width)
        scores = [_group_scores(calibration, group, score) for group in groups]
        score_ELF = torch.stack(scores)
        shared_LS = common_channels(score_ELF, size, width)
        taken_LF = torch.zeros_like(score_ELF[0], dtype=torch.bool).scatter_(
            1, shared_LS, value=True
        )
        kept = [top_channels(own.masked_fill(taken_LF, float("-inf")), width) for own in score_ELF]
        return ExpertPlan(
            torch.stack(kept, dim=1),
            tuple(map(tuple, groups)),
            dense.channels,
            shared_LS,
            active=active,
        )


def common_channels(score_ELF: Tensor, size: int, width: int) -> Tensor:
    """Return the `size` channels per layer that most experts rank among their best, [L, S].

    An expert's best are its first size + width; ties go to the better mean rank.
    """
    rank_ELF = score_ELF.argsort(dim=2, descending=True).argsort(dim=2)
    votes_LF = (rank_ELF < size + width).sum(dim=0)
    order_LF = votes_LF.double() - rank_ELF.double().mean(dim=0) / rank_ELF.shape[2]
    return top_channels(order_LF, size)


def _group_scores(calibration: Calibration, group: Sequence[str], score: Score) -> Tensor:
    layers = zip(*(calibration.stats[domain] for domain in group), strict=True)
    return score_layers(score, [pool(layer) for layer in layers], calibration.dense)
