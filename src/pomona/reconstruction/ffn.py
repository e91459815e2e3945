"""The FFNs of a dense model, and what flows through them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pomona.models.attachment import Attachment
from pomona.models.dense import DenseFamily
from pomona.shapes import Activation, PerLayerChannel, Tokens

Observe = Callable[[int, Tensor, Tensor, Tensor], None]


@dataclass(frozen=True)
class DenseModel:
    """A frozen dense model with its FFN modules in the order of the layers."""

    model: PreTrainedModel = field(repr=False)
    ffns: tuple[nn.Module, ...] = field(repr=False)

    @property
    def downs(self) -> list[nn.Linear]:
        """The down projections; channel f of a layer is column f of its weight [D, F]."""
        return [cast(nn.Linear, ffn.down_proj) for ffn in self.ffns]

    @property
    def channels(self) -> int:
        """F, the number of channels of a layer."""
        return self.downs[0].in_features


def dense_model(model: PreTrainedModel, family: DenseFamily) -> DenseModel:
    """Find the FFNs of a model of a dense family."""
    layers = range(int(model.config.num_hidden_layers))
    ffns = tuple(model.get_submodule(family.mlp.format(layer=layer)) for layer in layers)
    return DenseModel(model, ffns)


@torch.no_grad()
def observe(dense: DenseModel, windows_BT: Tokens, see: Observe, batch: int = 16) -> None:
    """Run windows through the model and show every layer's FFN, batch by batch.

    `see(layer, x_ND, activation_NF, y_ND)` gets the FFN's input, the input of `down_proj` and the
    FFN's output. Nothing is kept between batches, and no logits are computed.
    """
    inputs: dict[int, Tensor] = {}

    def before(layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs[layer] = args[0].flatten(0, 1)

        return hook

    def after(layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            see(layer, inputs.pop(layer), args[0].flatten(0, 1), output.flatten(0, 1))

        return hook

    handles = [
        *(ffn.register_forward_pre_hook(before(i)) for i, ffn in enumerate(dense.ffns)),
        *(down.register_forward_hook(after(i)) for i, down in enumerate(dense.downs)),
    ]
    with Attachment(tuple(handles)):
        for input_ids_BT in windows_BT.split(batch):
            dense.model.base_model(input_ids=input_ids_BT, use_cache=False)


@torch.no_grad()
def mean_hidden(dense: DenseModel, windows_BT: Tokens, batch: int = 16) -> Tensor:
    """Return every window's last hidden states, averaged over its tokens, [B, D] in float32."""
    means = [
        dense.model.base_model(input_ids=own, use_cache=False).last_hidden_state.float().mean(1)
        for own in windows_BT.split(batch)
    ]
    return torch.cat(means)


def pruned(dense: DenseModel, keep_LF: PerLayerChannel | Tensor) -> Attachment:
    """Attach masks at the inputs of `down_proj`: a pruned model without a copy of any weight.

    `keep_LF` is 1 for kept channels and 0 for pruned ones.
    """

    def mask(keep_F: Tensor) -> Callable[..., tuple[Activation]]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
            return (args[0] * keep_F.to(args[0].dtype),)

        return hook

    pairs = zip(dense.downs, keep_LF, strict=True)
    return Attachment(tuple(down.register_forward_pre_hook(mask(keep)) for down, keep in pairs))


def top_channels(score_LF: PerLayerChannel, width: int) -> Tensor:
    """Return the `width` best channels of every layer in ascending order, [L, W]."""
    return score_LF.topk(width, dim=1).indices.sort(dim=1).values


def keep_mask(kept_LW: Tensor, channels: int) -> Tensor:
    """Return kept channels as ones in [L, F]."""
    return torch.zeros(len(kept_LW), channels).scatter_(1, kept_LW, 1.0)


def stack_layers(values: Sequence[Tensor]) -> Tensor:
    """Return per-layer tensors stacked along a new first dimension."""
    return torch.stack(list(values))
