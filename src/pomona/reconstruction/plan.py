"""Which channels go to which expert."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from pomona.reconstruction.calibrate import ChannelStats, pool
from pomona.reconstruction.ffn import DenseModel, top_channels
from pomona.reconstruction.scores import Score, score_layers


@dataclass(frozen=True)
class ExpertPlan:
    """The kept channels of every layer and expert, [L, E, W] ascending, and each expert's domains."""

    keep_LEW: Tensor = field(repr=False)
    groups: tuple[tuple[str, ...], ...]
    channels: int

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON one can read: the channels of every layer and expert."""
        layers, experts, width = self.keep_LEW.shape
        return {
            "layers": layers,
            "experts": experts,
            "width": width,
            "dense_width": self.channels,
            "domains": [list(group) for group in self.groups],
            "channels": self.keep_LEW.tolist(),
        }

    @classmethod
    def from_json(cls, plan: Mapping[str, Any]) -> Self:
        """Return the plan that `to_json` described."""
        groups = tuple(tuple(group) for group in plan["domains"])
        return cls(torch.tensor(plan["channels"]), groups, int(plan["dense_width"]))


def plan_experts(
    dense: DenseModel,
    stats: Mapping[str, Sequence[ChannelStats]],
    groups: Sequence[Sequence[str]],
    score: Score,
    width: int,
) -> ExpertPlan:
    """Pool every group's statistics, score anew, keep the best `width` channels of every layer."""
    kept: list[Tensor] = []
    for group in groups:
        layers = zip(*(stats[domain] for domain in group), strict=True)
        pooled = [pool(layer) for layer in layers]
        kept.append(top_channels(score_layers(score, pooled, dense), width))
    keep_LEW = torch.stack(kept, dim=1)
    return ExpertPlan(keep_LEW, tuple(map(tuple, groups)), dense.channels)
