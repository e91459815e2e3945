"""Expert sites: the fused experts module of every MoE layer, found by structure.

In transformers 5.x every MoE family but a few calls one module with fused 3-D weights as
`experts(hidden[N, D], top_k_index[N, K], top_k_weights[N, K]) → [N, D]`. Everything Pomona does to
a mixture happens there: read an expert, count routing, add a graft.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as fn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation
from transformers.integrations.moe import (
    _default_apply_gate,  # pyright: ignore[reportPrivateUsage]
)
from transformers.modeling_layers import GradientCheckpointingLayer

from pomona.errors import PomonaError


@dataclass(frozen=True)
class DenseExpert:
    """One expert as a plain gated FFN: gate and up [W, D], down [D, W], biases [W], [W] and [D].

    All of them are views of the fused weights.
    """

    gate: Tensor = field(repr=False)
    up: Tensor = field(repr=False)
    down: Tensor = field(repr=False)
    gate_bias: Tensor | None = field(default=None, repr=False)
    up_bias: Tensor | None = field(default=None, repr=False)
    down_bias: Tensor | None = field(default=None, repr=False)


@dataclass(frozen=True)
class ExpertSite:
    """The experts of one layer; E, D and W are read from the weights, never from a config.

    `name` is the dotted path of the fused module in the model as transformers builds it, the same
    with and without a PEFT wrapper; `layer` is the decoder layer's number.
    """

    name: str
    layer: int
    num_experts: int
    hidden_size: int
    width: int
    experts: nn.Module = field(repr=False)
    router: nn.Module | None = field(repr=False)

    def expert(self, index: int) -> DenseExpert:
        """Return one expert's exact weights, whatever the family's layout."""
        gate_WD, up_WD = self.halves(self.weight("gate_up_proj", index), 0)
        bias = self.bias("gate_up_proj", index)
        gate_bias_W, up_bias_W = (None, None) if bias is None else self.halves(bias, 0)
        down_DW = self.weight("down_proj", index)
        down_bias_D = self.bias("down_proj", index)
        return DenseExpert(gate_WD, up_WD, down_DW, gate_bias_W, up_bias_W, down_bias_D)

    def gate_up(self, x_ND: Tensor, index: int) -> Float[Tensor, "N X"]:
        """Return the gate and up pre-activations [N, 2 W] of one expert; `halves` takes them apart."""
        return fn.linear(x_ND, self.weight("gate_up_proj", index), self.bias("gate_up_proj", index))

    def activate(self, gate_NW: Tensor, up_NW: Tensor) -> Tensor:
        """Return the family's own gated activation [N, W] of both halves, clamps included."""
        own = getattr(type(self.experts), "_apply_gate", None)
        if own is _default_apply_gate:  # what it does, without copying both halves together first
            return cast(Tensor, self.experts.act_fn(gate_NW)) * up_NW  # pyright: ignore[reportCallIssue]
        apply_gate = cast(Callable[[Tensor], Tensor], self.experts._apply_gate)
        if self.experts.is_concatenated:
            return apply_gate(torch.cat((gate_NW, up_NW), dim=-1))
        return apply_gate(torch.stack((gate_NW, up_NW), dim=-1).flatten(-2))

    def down(self, h_NW: Tensor, index: int, *, bias: bool = True) -> Float[Tensor, "N D"]:
        """Return one expert's output from its activation [N, W], its bias added if it has one."""
        own = self.bias("down_proj", index) if bias else None
        return fn.linear(h_NW, self.weight("down_proj", index), own)

    def apply(self, x_ND: Tensor, index: int) -> Float[Tensor, "N D"]:
        """Return E_e(x): one expert on every token, without its routing weight."""
        return self.down(self.activate(*self.halves(self.gate_up(x_ND, index))), index)

    def router_row(self, index: int) -> Float[Tensor, " D"] | None:
        """Return the router's weights for an expert, or None if the router is no matrix [E, D]."""
        if self.router is None:
            return None
        weight = getattr(self.router, "weight", None)
        if weight is None:  # some routers wrap a linear layer
            inner = [part.weight for part in self.router.children() if hasattr(part, "weight")]
            weight = inner[0] if len(inner) == 1 else None
        if weight is None or weight.shape != (self.num_experts, self.hidden_size):
            return None
        return cast(Tensor, weight)[index]

    def weight(self, name: str, index: int) -> Float[Tensor, "O I"]:
        """Return an expert's "gate_up_proj" or "down_proj", a view."""
        weight = cast(Tensor, getattr(self.experts, name))[index]
        return weight.T if self.experts.is_transposed else weight

    def bias(self, name: str, index: int) -> Float[Tensor, " O"] | None:
        """Return the bias of an expert's "gate_up_proj" or "down_proj", a view, if the family has them."""
        return getattr(self.experts, f"{name}_bias")[index] if self.experts.has_bias else None

    @property
    def plain(self) -> bool:
        """Whether the activation is silu(gate) · up, of a gate that comes before up."""
        return gates_by_silu(self.experts)

    def halves(self, both: Tensor, dim: int = -1) -> tuple[Tensor, Tensor]:
        """Return gate and up of what has both in the family's own layout."""
        if self.experts.is_concatenated:
            gate, up = both.chunk(2, dim=dim)
            return gate, up
        return (both[::2], both[1::2]) if dim == 0 else (both[..., ::2], both[..., 1::2])


def gates_by_silu(experts: nn.Module) -> bool:
    """Whether the activation of a fused module is silu(gate) · up, of a gate that comes before up."""
    own, act = getattr(type(experts), "_apply_gate", None), getattr(experts, "act_fn", None)
    silu = act is fn.silu or isinstance(act, (nn.SiLU, SiLUActivation))
    return own is _default_apply_gate and bool(experts.is_concatenated) and silu


def find_expert_sites(model: nn.Module) -> list[ExpertSite]:
    """Return every MoE layer's expert site, in the order of the layers.

    Raises `PomonaError` when the model is dense, or has experts that are not gated FFNs called in
    the common way.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore
    modules = dict(cast(nn.Module, base).named_modules())
    fused = {name: module for name, module in modules.items() if _is_fused(module)}
    obstacles = [reason for module in fused.values() if (reason := _obstacle(module))]
    if obstacles:
        raise PomonaError(
            f"{type(base).__name__} is not supported: {obstacles[0]}; take a model of a family "
            "such as Mixtral, Qwen-MoE, OLMoE, DeepSeek or GPT-OSS"
        )
    if not fused:
        raise PomonaError(
            f"{type(base).__name__} has no mixture-of-experts layer (no experts fused into 3-D "
            "weights); give an MoE checkpoint, or make one with `pomona reconstruct`"
        )
    sites = [_site(name, module, modules) for name, module in fused.items()]
    return sorted(sites, key=lambda site: site.layer)


def expert_sites_if_any(model: nn.Module) -> tuple[ExpertSite, ...]:
    """Return the sites of a mixture that is supported, and none of any other model."""
    try:
        return tuple(find_expert_sites(model))
    except PomonaError:
        return ()


def _is_fused(module: nn.Module) -> bool:
    """Tell experts by their 3-D weights; `up_proj` alone is a family without gates."""
    if hasattr(module, "get_delta_weight"):  # PEFT's wrapper shows the weights of what it wraps
        return False
    own = {name: getattr(module, name, None) for name in ("gate_up_proj", "up_proj", "down_proj")}
    flat = {name for name, value in own.items() if isinstance(value, Tensor) and value.ndim == 3}
    return "down_proj" in flat and len(flat) > 1


def _obstacle(module: nn.Module) -> str | None:
    """Return why nothing can be read from or added to these experts, or None."""
    down = cast(Tensor, module.down_proj)
    if not down.is_floating_point() or down.element_size() < 2:
        return f"its experts are quantised to {down.dtype}, load it in bfloat16 instead"
    # transformers marks the classes that follow the common signature with these attributes.
    if not all(hasattr(module, name) for name in ("is_transposed", "is_concatenated", "has_bias")):
        return (
            "it calls its experts in a way of its own (as Llama-4 does: experts(tokens·E, D)), not "
            "as experts(hidden, top_k_index, top_k_weights), so a graft has no place there"
        )
    if not module.has_gate:
        return "its experts have no gate projection, and a private expert is a gated FFN"
    if getattr(module, "has_post_expert_norm", False):
        return "its experts normalise their output, and a private expert is a plain gated FFN"
    return None


def _site(name: str, module: nn.Module, modules: dict[str, nn.Module]) -> ExpertSite:
    experts, hidden, width = cast(Tensor, module.down_proj).shape
    if module.is_transposed:
        hidden, width = width, hidden
    numbers = [int(part) for part in name.split(".") if part.isdecimal()]
    plain = ".".join(part for part in name.split(".") if part != "base_layer")
    router = _router(plain, modules)
    return ExpertSite(plain, numbers[-1] if numbers else 0, experts, hidden, width, module, router)


def _router(experts: str, modules: dict[str, nn.Module]) -> nn.Module | None:
    """Return the router beside the experts: transformers calls it `gate` or `router`."""
    block = experts.rpartition(".")[0]
    prefix = f"{block}." if block else ""
    return modules.get(f"{prefix}gate", modules.get(f"{prefix}router"))


def freeze(model: nn.Module) -> None:
    """Make every parameter of the base constant and put it in evaluation mode for good.

    Some families sample experts or jitter their input in training mode; the base never should.
    """
    model.requires_grad_(False)
    model.eval()


def enable_checkpointing(model: nn.Module) -> None:
    """Recompute decoder layers in the backward pass although the base stays in evaluation mode.

    transformers checkpoints a layer while that layer's own flag says training, and then takes its
    key-value cache away, which would spoil generation without a word. So the flag follows the
    autograd mode: on while gradients are recorded, off under `no_grad`. The flags of the layer's
    children, on which dropout and routing noise depend, stay off. Raises `PomonaError` when no
    layer of the model can be checkpointed.
    """
    layers = checkpointable_layers(model)
    if not layers:
        raise PomonaError(
            f"{type(model).__name__} has no layer that can be computed again in the backward pass; "
            "turn activation checkpointing off"
        )
    for layer in layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(  # pyright: ignore[reportArgumentType]
            checkpoint, use_reentrant=False
        )

    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.register_forward_pre_hook(_follow_autograd)


def _follow_autograd(model: nn.Module, _args: tuple[object, ...]) -> None:
    for layer in checkpointable_layers(model):
        layer.training = torch.is_grad_enabled()


def checkpointable_layers(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """Return the layers whose activations can be computed again."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
