"""WIFV, weighted input feature variance: what varies and is listened to, matters.

An et al., "Fluctuation-based Adaptive Structured Pruning for Large Language Models" (FLAP), AAAI 2024.
"""

from dataclasses import dataclass

from pomona.reconstruction.calibrate import ChannelStats
from pomona.shapes import DownProj, PerChannel


@dataclass(frozen=True)
class WIFV:
    """Scores channel f by var(activation of f) · ||down[:, f]||²."""

    @property
    def gradients(self) -> bool:
        """No backward pass is needed."""
        return False

    def __call__(self, stats: ChannelStats, down_DF: DownProj) -> PerChannel:
        """Return one importance per channel [F]; only the order within a layer is used."""
        return stats.variance_F * down_DF.square().sum(0)
