"""Weight magnitude: the baseline that looks at no data."""

from dataclasses import dataclass

from pomona.reconstruction.calibrate import ChannelStats
from pomona.shapes import DownProj, PerChannel


@dataclass(frozen=True)
class Magnitude:
    """Scores channel f by ||down[:, f]||."""

    @property
    def gradients(self) -> bool:
        """No backward pass is needed."""
        return False

    def __call__(self, stats: ChannelStats, down_DF: DownProj) -> PerChannel:
        """Return one importance per channel [F]; only the order within a layer is used."""
        return down_DF.norm(dim=0)
