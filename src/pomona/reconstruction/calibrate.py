"""Streaming statistics of FFN channels: one forward pass of the dense model per domain.

DIVE (arXiv 2506.09351), calibration. The statistics are merged batch by batch as Chan, Golub &
LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979, in float64;
no activation outlives its batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from pomona.errors import PomonaError
from pomona.reconstruction.ffn import DenseModel, observe
from pomona.shapes import PerChannel, Tokens


@dataclass(frozen=True)
class ChannelStats:
    """Over `count` tokens, per channel: the mean [F] and the summed squared deviation [F]."""

    count: int
    mean_F: Tensor
    deviation_F: Tensor

    @property
    def variance_F(self) -> PerChannel:
        """The (population) variance."""
        return self.deviation_F / self.count

    @property
    def mean_square_F(self) -> PerChannel:
        """The second moment."""
        return self.variance_F + self.mean_F.square()


def stats_of(activation_NF: Tensor) -> ChannelStats:
    """Return the statistics of one batch."""
    wide_NF = activation_NF.double()
    mean_F = wide_NF.mean(0)
    return ChannelStats(len(wide_NF), mean_F, (wide_NF - mean_F).square().sum(0))


def merge(a: ChannelStats, b: ChannelStats) -> ChannelStats:
    """Return the statistics of both sets of tokens together."""
    count = a.count + b.count
    step_F = b.mean_F - a.mean_F
    return ChannelStats(
        count,
        a.mean_F + step_F * (b.count / count),
        a.deviation_F + b.deviation_F + step_F.square() * (a.count * b.count / count),
    )


def pool(stats: Sequence[ChannelStats]) -> ChannelStats:
    """Return the statistics of several domains together, each with the tokens it has."""
    return reduce(merge, stats)


def calibrate(dense: DenseModel, windows_BT: Tokens) -> list[ChannelStats]:
    """Return every layer's channel statistics on one domain's windows.

    Raises `PomonaError` naming the first layer whose activations are not finite: nothing that
    follows could tell its channels apart.
    """
    layers: dict[int, ChannelStats] = {}

    def see(layer: int, _x_ND: Tensor, activation_NF: Tensor, _y_ND: Tensor) -> None:
        new = stats_of(activation_NF)
        layers[layer] = merge(layers[layer], new) if layer in layers else new

    with torch.no_grad():
        observe(dense, windows_BT, see)
    for layer, stats in sorted(layers.items()):
        if not stats.deviation_F.isfinite().all():
            raise PomonaError(
                f"layer {layer} of the dense model gives FFN activations that are not finite; its "
                "checkpoint is damaged, copy or download it again"
            )
    return [layers[layer] for layer in range(len(dense.ffns))]
