"""Random scores: the control that says whether choosing channels matters."""

from dataclasses import dataclass

import torch

from pomona.reconstruction.calibrate import ChannelStats
from pomona.seeds import torch_generator
from pomona.shapes import DownProj, PerChannel


@dataclass(frozen=True)
class RandomScore:
    """Draws every channel's score uniformly, a function of its seed and of what is scored.

    Different layers and domains get different draws: their statistics seed the generator.

    Attributes:
        seed: Of the draw.
    """

    seed: int = 0

    @property
    def gradients(self) -> bool:
        """No backward pass is needed."""
        return False

    def __call__(self, stats: ChannelStats, down_DF: DownProj) -> PerChannel:
        """Return one importance per channel [F]."""
        what = stats.mean_F.cpu().numpy().tobytes().hex()
        generator = torch_generator(self.seed, "random score", stats.count, what)
        return torch.rand(down_DF.shape[1], generator=generator, dtype=torch.float64)
