"""The FFNs of a dense model, and what flows through them."""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import cast

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from pomona.models.attachment import Attachment
from pomona.models.dense import DenseFamily
from pomona.models.placement import device_of
from pomona.models.weights import Checkpoint
from pomona.shapes import Activation, Hidden, PerLayerChannel, Tokens

Observe = Callable[[int, Tensor, Tensor, Tensor], None]


@dataclass(frozen=True)
class DenseModel:
    """A frozen dense model with its FFN modules in the order of the layers.

    Its weights may lie on disk and visit memory one module at a time; `stored` then reads a layer's
    `down_proj` from the checkpoint.
    """

    model: PreTrainedModel = field(repr=False)
    ffns: tuple[nn.Module, ...] = field(repr=False)
    stored: Callable[[int], Tensor] = field(repr=False)

    @property
    def downs(self) -> list[nn.Linear]:
        """The down projections; channel f of a layer is column f of its weight [D, F]."""
        return [cast(nn.Linear, ffn.down_proj) for ffn in self.ffns]

    @property
    def channels(self) -> int:
        """F, the number of channels of a layer."""
        return self.downs[0].in_features

    @property
    def hidden(self) -> int:
        """D, the width of the model."""
        return self.downs[0].out_features

    @property
    def device(self) -> torch.device:
        """Where tokens go in."""
        return device_of(self.model)

    def down_DF(self, layer: int) -> Tensor:
        """Return the weight of a layer's `down_proj` [D, F], wherever it lies."""
        weight = self.downs[layer].weight.detach()
        on_disk = weight.device.type == "meta"
        return self.stored(layer).to(self.device) if on_disk else weight


def dense_model(model: PreTrainedModel, family: DenseFamily, checkpoint: Checkpoint) -> DenseModel:
    """Find the FFNs of a model of a dense family, loaded from `checkpoint`."""
    prefixes = [family.mlp.format(layer=i) for i in range(int(model.config.num_hidden_layers))]

    def stored(layer: int) -> Tensor:
        return checkpoint.tensor(f"{prefixes[layer]}.down_proj.weight").to(model.dtype)

    return DenseModel(model, tuple(map(model.get_submodule, prefixes)), stored)


class _EnoughError(Exception):
    """Ends a forward pass after the last layer that anybody looks at."""


@torch.no_grad()
def observe(
    dense: DenseModel,
    windows_BT: Tokens,
    see: Observe,
    layers: range | None = None,
    batch: int = 16,
) -> None:
    """Run windows through the model and show every layer's FFN (or those of `layers`), batch by batch.

    `see(layer, x_ND, activation_NF, y_ND)` gets the FFN's input, the input of `down_proj` and the
    FFN's output. Nothing is kept between batches, and no logits are computed.
    """
    layers = range(len(dense.ffns)) if layers is None else layers
    inputs: dict[int, Tensor] = {}

    def before(layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs[layer] = args[0].flatten(0, 1)

        return hook

    def after(layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            see(layer, inputs.pop(layer), args[0].flatten(0, 1), output.flatten(0, 1))
            if layer == layers[-1] < len(dense.ffns) - 1:
                raise _EnoughError

        return hook

    handles = [
        *(dense.ffns[i].register_forward_pre_hook(before(i)) for i in layers),
        *(dense.downs[i].register_forward_hook(after(i)) for i in layers),
    ]
    with Attachment(tuple(handles)):
        for input_ids_BT in windows_BT.split(batch):
            with suppress(_EnoughError):
                dense.model.base_model(input_ids=input_ids_BT.to(dense.device), use_cache=False)


def sample_inputs(
    dense: DenseModel, windows: Sequence[Tensor], tokens: int, layers: range
) -> list[Tensor]:
    """Return the FFN inputs of `layers`, [N, D] each, N at most about `tokens`, each window set alike.

    What is kept does not grow with the number of windows.
    """
    inputs: dict[int, list[Tensor]] = {layer: [] for layer in layers}

    def see(layer: int, x_ND: Tensor, _activation_NF: Tensor, _y_ND: Tensor) -> None:
        inputs[layer].append(x_ND)

    for windows_BT in windows:
        each = max(1, tokens // len(windows) // windows_BT.shape[1])
        observe(dense, windows_BT[:each], see, layers)
    return [torch.cat(parts) for parts in inputs.values()]


@torch.no_grad()
def through_ffn(
    dense: DenseModel, layer: int, x_ND: Hidden, batch: int = 4096
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield (rows, activation_NF, y_ND) of one layer's FFN over its inputs, batch by batch."""
    seen: list[Tensor] = []

    def look(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0])

    with Attachment((dense.downs[layer].register_forward_pre_hook(look),)):
        for start in range(0, len(x_ND), batch):
            rows = slice(start, start + batch)
            y_ND = dense.ffns[layer](x_ND[rows])
            yield rows, seen.pop(), y_ND


@torch.no_grad()
def mean_hidden(dense: DenseModel, windows_BT: Tokens, batch: int = 16) -> Tensor:
    """Return every window's last hidden states, averaged over its tokens, [B, D] in float32."""
    means = [
        dense.model.base_model(input_ids=own.to(dense.device), use_cache=False)
        .last_hidden_state.float()
        .mean(1)
        .cpu()
        for own in windows_BT.split(batch)
    ]
    return torch.cat(means)


@contextmanager
def pruned(dense: DenseModel, kept_LW: Int[Tensor, "L W"]) -> Generator[None]:
    """Prune every FFN to its kept channels (in ascending order) for a while; what is pruned is not computed.

    The kept rows of `gate_proj` and `up_proj` and columns of `down_proj` take the place of the weights. Weights
    that lie on disk stay there, and pruned channels are zeroed at the input of `down_proj` (`masked`).
    """
    if dense.downs[0].weight.device.type == "meta":
        with masked(dense, keep_mask(kept_LW, dense.channels)):
            yield
        return
    whole = [(part, dict(part.named_parameters())) for part in _parts(dense)]
    try:
        for ffn, kept_W in zip(dense.ffns, kept_LW.to(dense.device), strict=True):
            for name, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
                _take(ffn.get_submodule(name), kept_W, dim)
        yield
    finally:
        for part, parameters in whole:
            for name, parameter in parameters.items():
                setattr(part, name, parameter)


def _parts(dense: DenseModel) -> list[nn.Linear]:
    names = ("gate_proj", "up_proj", "down_proj")
    return [cast(nn.Linear, getattr(ffn, name)) for ffn in dense.ffns for name in names]


def _take(part: nn.Module, kept_W: Tensor, dim: int) -> None:
    """Replace a projection's parameters by those of some channels; a bias of the output is no channel's."""
    for name, parameter in list(part.named_parameters()):
        if dim < parameter.ndim:
            own = parameter.detach().index_select(dim, kept_W)
            setattr(part, name, nn.Parameter(own, requires_grad=False))


def masked(dense: DenseModel, keep_LF: PerLayerChannel | Tensor) -> Attachment:
    """Attach masks at the inputs of `down_proj`: a pruned model that computes everything, without any copy.

    `keep_LF` is 1 for kept channels and 0 for pruned ones. The twin of `pruned`.
    """

    def mask(keep_F: Tensor) -> Callable[..., tuple[Activation]]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
            return (args[0] * keep_F.to(args[0].device, args[0].dtype),)

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
