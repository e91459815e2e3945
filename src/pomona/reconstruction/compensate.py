"""What the kept channels of an expert do for the pruned ones.

DIVE compensates with FLAP's bias on `down_proj`, for which no stock format has a home; the default
here is the bias-free least-squares refit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from pomona.errors import PomonaError
from pomona.reconstruction.ffn import DenseModel, observe
from pomona.shapes import Tokens


@runtime_checkable
class Compensation(Protocol):
    """Gives an expert the `down_proj` columns of its kept channels."""

    def __call__(self, dense: DenseModel, windows_BT: Tokens, keep_LW: Tensor) -> Sequence[Tensor]:
        """Return each layer's columns [D, W], given the windows of the expert's group."""
        ...


@dataclass(frozen=True)
class NoCompensation:
    """The dense columns as they are."""

    def __call__(self, dense: DenseModel, windows_BT: Tokens, keep_LW: Tensor) -> Sequence[Tensor]:
        """Return each layer's own columns [D, W]."""
        pairs = zip(dense.downs, keep_LW, strict=True)
        return [down.weight.detach().double()[:, keep_W] for down, keep_W in pairs]


@dataclass(frozen=True)
class Ridge:
    """down' = Y Hᵀ (H Hᵀ + λ I)⁻¹ with H the kept activations [W, N] and Y the dense output [D, N].

    With S = Σ h hᵀ over all channels, Y Hᵀ = down · S[:, keep] and H Hᵀ = S[keep, keep]: only S is
    kept, never an activation. `penalty` is λ relative to the mean diagonal of H Hᵀ; it pulls towards
    the dense columns, which are the exact solution when nothing is pruned.
    """

    penalty: float = 1e-2

    def __post_init__(self) -> None:
        if not self.penalty > 0:
            raise PomonaError(f"ridge penalty {self.penalty} is not positive; use for example 0.01")

    def __call__(self, dense: DenseModel, windows_BT: Tokens, keep_LW: Tensor) -> Sequence[Tensor]:
        """Return each layer's refitted columns [D, W] in float64."""
        moments = second_moments(dense, windows_BT)
        return [
            self.refit(down.weight.detach().double(), moment_FF, keep_W)
            for down, moment_FF, keep_W in zip(dense.downs, moments, keep_LW, strict=True)
        ]

    def refit(self, down_DF: Tensor, moment_FF: Tensor, keep_W: Tensor) -> Tensor:
        """Return one layer's columns: the dense ones plus what the pruned channels can be told by.

        Writing down' = down[:, keep] + Δ, the ridge problem for Δ has the pruned channels' output
        as its target.
        """
        gone_F = torch.ones(down_DF.shape[1], dtype=torch.bool)
        gone_F[keep_W] = False
        gram_WW = moment_FF[keep_W][:, keep_W]
        target_DW = down_DF[:, gone_F] @ moment_FF[gone_F][:, keep_W]
        lift = self.penalty * gram_WW.diagonal().mean().clamp_min(1e-30)
        eye_WW = torch.eye(len(keep_W), dtype=gram_WW.dtype)
        delta_DW = torch.linalg.solve(gram_WW + lift * eye_WW, target_DW.T).T
        return down_DF[:, keep_W] + delta_DW


COMPENSATIONS: dict[str, type[Ridge] | type[NoCompensation]] = {
    "ridge": Ridge,
    "none": NoCompensation,
}


def second_moments(dense: DenseModel, windows_BT: Tokens) -> list[Tensor]:
    """Return Σ_tokens h hᵀ of every layer's channels, [F, F] each, summed in float64."""
    size = dense.channels
    moments = [torch.zeros(size, size, dtype=torch.float64) for _ in dense.ffns]

    def see(layer: int, _x_ND: Tensor, activation_NF: Tensor, _y_ND: Tensor) -> None:
        wide_NF = activation_NF.float()
        moments[layer] += (wide_NF.T @ wide_NF).double()

    observe(dense, windows_BT, see)
    return moments
