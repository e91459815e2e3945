"""Streaming statistics of FFN channels: one forward pass of the dense model per domain.

DIVE (arXiv 2506.09351), calibration. The statistics are merged batch by batch as Chan, Golub &
LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979, in float64;
no activation outlives its batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor, nn

from pomona.errors import PomonaError
from pomona.models.attachment import Attachment
from pomona.reconstruction.ffn import DenseModel, observe
from pomona.shapes import PerChannel, Tokens


@dataclass(frozen=True)
class ChannelStats:
    """Over `count` tokens, per channel: the mean [F] and the summed squared deviation [F].

    `saliency_F` is Σ |h · ∂loss/∂h|, the first-order change of the loss, where gradients were asked
    for.
    """

    count: int
    mean_F: Tensor
    deviation_F: Tensor
    saliency_F: Tensor | None = None

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
    wide_NF = activation_NF.to(torch.float64, copy=True)
    mean_F = wide_NF.mean(0)
    deviation_F = wide_NF.sub_(mean_F).square_().sum(0)
    return ChannelStats(len(wide_NF), mean_F.cpu(), deviation_F.cpu())


def merge(a: ChannelStats, b: ChannelStats) -> ChannelStats:
    """Return the statistics of both sets of tokens together."""
    count = a.count + b.count
    step_F = b.mean_F - a.mean_F
    return ChannelStats(
        count,
        a.mean_F + step_F * (b.count / count),
        a.deviation_F + b.deviation_F + step_F.square() * (a.count * b.count / count),
        None if a.saliency_F is None or b.saliency_F is None else a.saliency_F + b.saliency_F,
    )


def pool(stats: Sequence[ChannelStats]) -> ChannelStats:
    """Return the statistics of several domains together, each with the tokens it has."""
    return reduce(merge, stats)


def calibrate(dense: DenseModel, windows_BT: Tokens, gradients: bool = False) -> list[ChannelStats]:
    """Return every layer's channel statistics on one domain's windows.

    With `gradients` the saliency of every channel too, at the price of a backward pass.

    Raises `PomonaError` naming the first layer whose activations are not finite: nothing that
    follows could tell its channels apart.
    """
    layers: dict[int, ChannelStats] = {}

    def see(layer: int, _x_ND: Tensor, activation_NF: Tensor, _y_ND: Tensor) -> None:
        new = stats_of(activation_NF)
        layers[layer] = merge(layers[layer], new) if layer in layers else new

    observe(dense, windows_BT, see)
    for layer, stats in sorted(layers.items()):
        if not stats.deviation_F.isfinite().all():
            raise PomonaError(
                f"layer {layer} of the dense model gives FFN activations that are not finite; its "
                "checkpoint is damaged, copy or download it again"
            )
    found = [layers[layer] for layer in range(len(dense.ffns))]
    if not gradients:
        return found
    return [
        replace(own, saliency_F=saliency_F)
        for own, saliency_F in zip(found, saliency(dense, windows_BT), strict=True)
    ]


def saliency(dense: DenseModel, windows_BT: Tokens, batch: int = 8) -> list[Tensor]:
    """Return Σ_tokens |h · ∂loss/∂h| of every layer's channels, [F] each, in float64.

    The loss is the summed cross-entropy of the next token. The weights stay frozen: the gradient
    enters at the embeddings.
    """
    sums = [torch.zeros(dense.channels, dtype=torch.float64) for _ in dense.ffns]

    def watch(layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            activation = args[0]

            def add(gradient: Tensor) -> None:
                change_NF = (activation.detach() * gradient).flatten(0, 1).abs()
                sums[layer] += change_NF.double().sum(0).cpu()

            activation.register_hook(add)

        return hook

    handles = [
        dense.model.get_input_embeddings().register_forward_hook(_needs_gradient),
        *(down.register_forward_pre_hook(watch(i)) for i, down in enumerate(dense.downs)),
    ]
    with Attachment(tuple(handles)), torch.enable_grad():
        for own_BT in windows_BT.split(batch):
            input_ids_BT = own_BT.to(dense.device)
            dense.model(input_ids=input_ids_BT, labels=input_ids_BT, use_cache=False).loss.mul(
                input_ids_BT[:, 1:].numel()
            ).backward()
    return sums


def _needs_gradient(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output.detach().requires_grad_()
