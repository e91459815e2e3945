"""Frozen experts by grouped products, with every gradient on the way back written once.

They compute what transformers' `grouped_mm` does, which is the readable twin. There torch differentiates a
gather of rows by scattering them one by one, and gate and up by joining copies.
"""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.integrations.moe import (
    ExpertsInterface,
    _grouped_linear,  # pyright: ignore[reportPrivateUsage]
    grouped_mm_experts_forward,
)

from pomona.models.experts import gates_by_silu
from pomona.models.gated import gated

_TWIN, _OURS = "grouped_mm", "pomona_grouped_mm"


def use_frozen_experts(model: PreTrainedModel) -> None:
    """Have experts that grouped products compute be computed by these; others stay as they are."""
    if getattr(model.config, "_experts_implementation", None) == _TWIN:
        ExpertsInterface.register(_OURS, frozen_experts)
        model.set_experts_implementation(_OURS)


@contextmanager
def as_generation_knows(model: PreTrainedModel) -> Generator[None]:
    """Have transformers' own products compute experts: `generate` replaces them where others are faster."""
    ours = getattr(model.config, "_experts_implementation", None) == _OURS
    if ours:
        model.set_experts_implementation(_TWIN)
    try:
        yield
    finally:
        if ours:
            use_frozen_experts(model)


def frozen_experts(
    self: nn.Module,
    hidden_states: Float[Tensor, "N D"],
    top_k_index: Int[Tensor, "N K"],
    top_k_weights: Float[Tensor, "N K"],
) -> Float[Tensor, "N D"]:
    """Return what a layer's experts give, called as transformers calls an implementation."""
    experts = cast(Any, self)
    if experts._is_expert_parallel:
        return grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    copies = top_k_index.shape[1]
    expert_S, order_S = torch.sort(top_k_index.flatten())
    place_S = torch.empty_like(order_S)
    place_S[order_S] = torch.arange(len(order_S), device=order_S.device)
    numbers_E = torch.arange(experts.num_experts, device=expert_S.device)
    ends_E = torch.searchsorted(expert_S, numbers_E, right=True).int()

    def product(x_SD: Tensor, name: str) -> Tensor:
        bias = getattr(self, f"{name}_bias")[expert_S] if experts.has_bias else None
        return _grouped_linear(x_SD, getattr(self, name), ends_E, bias, experts.is_transposed)

    x_SD = _permuted(hidden_states, order_S, place_S, copies)
    if not experts.has_gate:
        inner_SW = experts.act_fn(product(x_SD, "up_proj"))
    elif gates_by_silu(self):
        inner_SW = gated(product(x_SD, "gate_up_proj"))
    else:
        inner_SW = experts._apply_gate(product(x_SD, "gate_up_proj"))
    out_SD = product(inner_SW, "down_proj")
    if experts.has_post_expert_norm:
        out_SD = experts.post_expert_norm(out_SD)
    weight_S1 = _permuted(top_k_weights.reshape(-1, 1), order_S, place_S)
    weighted_SD = _permuted(out_SD * weight_S1, place_S, order_S)
    return weighted_SD.unflatten(0, (-1, copies)).sum(1).to(hidden_states.dtype)


def _permuted(x_ND: Tensor, order_S: Tensor, place_S: Tensor, copies: int = 1) -> Tensor:
    """Return so many copies of every row in another order; place_S is where each of them has gone."""
    return cast(Tensor, _Permuted.apply(x_ND, order_S, place_S, copies))


class _Permuted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, order_S: Tensor, place_S: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(place_S)
        ctx.copies = copies
        return x_ND.index_select(0, order_S // copies)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - the decorator hides names
        ctx: Any, *pulls: Tensor
    ) -> tuple[Tensor, None, None, None]:
        (place_S,) = ctx.saved_tensors
        pull_SD = pulls[0].index_select(0, place_S)
        found_ND = pull_SD if ctx.copies == 1 else pull_SD.unflatten(0, (-1, ctx.copies)).sum(1)
        return found_ND, None, None, None
