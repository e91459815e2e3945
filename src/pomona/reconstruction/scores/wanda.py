"""Wanda, per FFN channel: outgoing weight and activation must both be large.

Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024.
"""

from dataclasses import dataclass

from pomona.reconstruction.calibrate import ChannelStats
from pomona.shapes import DownProj, PerChannel


@dataclass(frozen=True)
class Wanda:
    """Scores channel f by ||down[:, f]|| · rms(activation of f)."""

    @property
    def gradients(self) -> bool:
        """No backward pass is needed."""
        return False

    def __call__(self, stats: ChannelStats, down_DF: DownProj) -> PerChannel:
        """Return one importance per channel [F]; only the order within a layer is used."""
        return down_DF.norm(dim=0) * stats.mean_square_F.sqrt()
