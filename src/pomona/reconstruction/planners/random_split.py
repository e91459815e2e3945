"""A random partition of the channels, the LLaMA-MoE baseline.

Zhu et al., "LLaMA-MoE: Building Mixture-of-Experts from LLaMA with Continual Pre-training", EMNLP 2024.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pomona.errors import PomonaError
from pomona.reconstruction.plan import ExpertPlan, no_channels
from pomona.reconstruction.planners.protocol import Calibration
from pomona.reconstruction.scores import Score
from pomona.seeds import torch_generator


@dataclass(frozen=True)
class RandomSplit:
    """Deals every channel of a layer to exactly one expert, at random.

    The dense FFN is the sum of its parts, so every part's output is multiplied by the number of
    active experts, whose routing weights sum to one. What the others hold is not gone, so there is
    nothing to compensate and no other channels to choose.
    """

    @property
    def divides(self) -> bool:
        """Every channel has exactly one expert."""
        return True

    def shared_channels(self, channels: int, experts: int, width: int) -> int:
        """None is shared; raises `PomonaError` where the experts do not divide all channels."""
        check_divides(channels, experts, width)
        return 0

    def __call__(
        self,
        calibration: Calibration,
        groups: Sequence[Sequence[str]],
        score: Score,
        width: int,
        active: int,
        seed: int,
    ) -> ExpertPlan:
        """Return the partition; the score is not used."""
        layers, channels = len(calibration.dense.ffns), calibration.dense.channels
        self.shared_channels(channels, len(groups), width)
        generator = torch_generator(seed, "random split")
        order_LF = torch.stack(
            [torch.randperm(channels, generator=generator) for _ in range(layers)]
        )
        keep_LEW = order_LF[:, : len(groups) * width].view(layers, len(groups), width)
        return ExpertPlan(
            keep_LEW.sort(dim=2).values,
            tuple(map(tuple, groups)),
            channels,
            no_channels(layers),
            gain=float(active),
            active=active,
        )


def check_divides(channels: int, experts: int, width: int) -> None:
    """Raise `PomonaError` where experts that share no channel would leave some out or lack some."""
    if width != channels // experts:
        raise PomonaError(
            f"{experts} experts that divide {channels} channels among them have {channels // experts} "
            f"each, not {width}; set keep to {channels // experts / channels:.6g}"
        )
