"""Taylor, first order: how much the loss would change if a channel were gone.

Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient Inference", ICLR 2017;
used on language models by LLM-Pruner (Ma et al., NeurIPS 2023).
"""

from dataclasses import dataclass

from pomona.errors import PomonaError
from pomona.reconstruction.calibrate import ChannelStats
from pomona.shapes import DownProj, PerChannel


@dataclass(frozen=True)
class Taylor:
    """Scores channel f by the mean over tokens of |h_f · ∂loss/∂h_f|."""

    @property
    def gradients(self) -> bool:
        """It needs a backward pass."""
        return True

    def __call__(self, stats: ChannelStats, down_DF: DownProj) -> PerChannel:
        """Return one importance per channel [F]."""
        if stats.saliency_F is None:
            raise PomonaError(
                "the score taylor needs statistics with gradients; calibrate with them"
            )
        return stats.saliency_F / stats.count
