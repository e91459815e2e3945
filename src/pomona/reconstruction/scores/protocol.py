"""What a score is."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch

from pomona.reconstruction.calibrate import ChannelStats
from pomona.reconstruction.ffn import DenseModel
from pomona.shapes import DownProj, PerChannel, PerLayerChannel


@runtime_checkable
class Score(Protocol):
    """Gives every FFN channel of a layer an importance."""

    @property
    def gradients(self) -> bool:
        """Whether calibration has to gather `ChannelStats.saliency_F` for it."""
        ...

    def __call__(self, stats: ChannelStats, down_DF: DownProj) -> PerChannel:
        """Return one importance per channel [F]; only the order within a layer is used."""
        ...


def score_layers(score: Score, stats: Sequence[ChannelStats], dense: DenseModel) -> PerLayerChannel:
    """Return the scores of all layers, [L, F], in float64."""
    return torch.stack(
        [score(own, dense.down_DF(layer).double().cpu()) for layer, own in enumerate(stats)]
    )
