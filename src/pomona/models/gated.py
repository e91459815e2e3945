"""silu(gate) · up of one expert, or of two at once: what they give and by how much the second differs.

Written out, with `plain_gated` and `plain_gated_pair` as twins: neither pass joins copies of gate and up, and
gradients are written where they belong.
"""

from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as fn


def gated(both_NX: Float[Tensor, "N X"]) -> Float[Tensor, "N W"]:
    """Return silu(gate) · up [N, W]; X is gate and up, 2 W."""
    return cast(Tensor, _Gated.apply(both_NX))


def plain_gated(both_NX: Tensor) -> Tensor:
    """Return what `gated` does, as torch differentiates it."""
    gate_NW, up_NW = both_NX.chunk(2, 1)
    return fn.silu(gate_NW) * up_NW


def gated_pair(
    resident_NX: Float[Tensor, "N X"], own_NX: Float[Tensor, "N X"]
) -> tuple[Float[Tensor, "N W"], Float[Tensor, "N W"]]:
    """Return silu(gate) · up of `own` [N, W], and that less the same of `resident`; X is gate and up, 2 W."""
    return cast(tuple[Tensor, Tensor], _GatedPair.apply(resident_NX, own_NX))


def plain_gated_pair(resident_NX: Tensor, own_NX: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `gated_pair` does, as torch differentiates it."""
    own_NW = plain_gated(own_NX)
    return own_NW, own_NW - plain_gated(resident_NX)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both_NX: Tensor) -> Tensor:
        ctx.save_for_backward(both_NX)
        return _product(both_NX)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - the decorator hides names
        ctx: Any, *pulls: Tensor
    ) -> Tensor:
        return _pulled(pulls[0], *ctx.saved_tensors)


class _GatedPair(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, resident_NX: Tensor, own_NX: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(resident_NX, own_NX)
        own_NW = _product(own_NX)
        return own_NW, own_NW - _product(resident_NX)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - the decorator hides names
        ctx: Any, *pulls: Tensor
    ) -> tuple[Tensor, Tensor]:
        pull_own_NW, pull_moved_NW = pulls
        resident_NX, own_NX = ctx.saved_tensors
        return _pulled(-pull_moved_NW, resident_NX), _pulled(pull_own_NW + pull_moved_NW, own_NX)


def _product(both_NX: Tensor) -> Tensor:
    gate_NW, up_NW = both_NX.chunk(2, 1)
    return fn.silu(gate_NW).mul_(up_NW)


def _pulled(pull_NW: Tensor, both_NX: Tensor) -> Tensor:
    """Return the gradient at gate and up of silu(gate) · up."""
    gate_NW, up_NW = both_NX.chunk(2, 1)
    found_NX = torch.empty_like(both_NX)
    found_gate_NW, found_up_NW = found_NX.chunk(2, 1)
    torch.ops.aten.silu_backward.grad_input(pull_NW * up_NW, gate_NW, grad_input=found_gate_NW)
    torch.mul(fn.silu(gate_NW), pull_NW, out=found_up_NW)
    return found_NX
