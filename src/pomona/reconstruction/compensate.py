"""What the kept channels of an expert do for the pruned ones.

DIVE compensates with FLAP's bias on `down_proj`, for which no stock mixture has a home; the default
here is the bias-free least-squares refit.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from pomona.errors import PomonaError
from pomona.reconstruction.ffn import DenseModel, observe
from pomona.reconstruction.plan import ExpertPlan
from pomona.shapes import Tokens


@dataclass(frozen=True)
class Refit:
    """One layer's `down_proj` columns for an expert's kept channels [D, W], and a bias [D] or none."""

    column_DW: Tensor = field(repr=False)
    bias_D: Tensor | None = field(default=None, repr=False)


@runtime_checkable
class Compensation(Protocol):
    """Gives an expert the `down_proj` columns of its kept channels."""

    @property
    def biased(self) -> bool:
        """Whether it also gives a bias, which few formats can hold."""
        ...

    def __call__(
        self, dense: DenseModel, windows_BT: Tokens, plan: ExpertPlan, expert: int
    ) -> Sequence[Refit]:
        """Return every layer's refit, given the windows of the expert's group."""
        ...


@dataclass(frozen=True)
class NoCompensation:
    """The dense columns as they are."""

    @property
    def biased(self) -> bool:
        """No bias."""
        return False

    def __call__(
        self, dense: DenseModel, windows_BT: Tokens, plan: ExpertPlan, expert: int
    ) -> Sequence[Refit]:
        """Return each layer's own columns."""
        return [Refit(column_DW) for column_DW in _own_columns(dense, plan, expert)]


@dataclass(frozen=True)
class Bias:
    """FLAP's bias Σ_{f pruned} mean_f · down[:, f]: the mean of what is gone.

    An et al., "Fluctuation-based Adaptive Structured Pruning for Large Language Models", AAAI 2024.
    Only a pruned Llama (one expert, `mlp_bias`) has a home for it.
    """

    @property
    def biased(self) -> bool:
        """This is what it gives."""
        return True

    def __call__(
        self, dense: DenseModel, windows_BT: Tokens, plan: ExpertPlan, expert: int
    ) -> Sequence[Refit]:
        """Return each layer's own columns and the bias."""
        sums = [torch.zeros(dense.channels, dtype=torch.float64) for _ in dense.ffns]

        def see(layer: int, _x_ND: Tensor, activation_NF: Tensor, _y_ND: Tensor) -> None:
            sums[layer] += activation_NF.double().sum(0).cpu()

        observe(dense, windows_BT, see)
        gone_LF = plan.gone_mask(expert)
        return [
            Refit(
                column_DW,
                down.weight.detach().double().cpu() @ (gone_F * sum_F / windows_BT.numel()),
            )
            for column_DW, down, gone_F, sum_F in zip(
                _own_columns(dense, plan, expert), dense.downs, gone_LF, sums, strict=True
            )
        ]


@dataclass(frozen=True)
class Ridge:
    """down' = Y Hᵀ (H Hᵀ + λ I)⁻¹ with H the kept activations [W, N] and Y the dense output [D, N].

    Only the sums H Hᵀ [W, W] and P Hᵀ [D, W] are kept, P being the output of the pruned channels:
    never an activation. `penalty` is λ relative to the mean diagonal of H Hᵀ; it pulls towards the
    dense columns, which are the exact solution when nothing is pruned.
    """

    penalty: float = 1e-2

    def __post_init__(self) -> None:
        if not self.penalty > 0:
            raise PomonaError(f"ridge penalty {self.penalty} is not positive; use for example 0.01")

    @property
    def biased(self) -> bool:
        """No bias."""
        return False

    def __call__(
        self, dense: DenseModel, windows_BT: Tokens, plan: ExpertPlan, expert: int
    ) -> Sequence[Refit]:
        """Return each layer's refitted columns."""
        sums = normal_equations(dense, windows_BT, plan, expert)
        own = _own_columns(dense, plan, expert)
        return [
            Refit(self.refit(column_DW, *equations))
            for column_DW, equations in zip(own, sums, strict=True)
        ]

    def refit(self, column_DW: Tensor, gram_WW: Tensor, target_DW: Tensor) -> Tensor:
        """Return one layer's columns: the dense ones plus what the pruned channels can be told by.

        Writing down' = down[:, keep] + Δ, the ridge problem for Δ has the pruned channels' output P
        as its target.
        """
        lift = self.penalty * gram_WW.diagonal().mean().clamp_min(1e-30)
        eye_WW = torch.eye(len(gram_WW), dtype=gram_WW.dtype)
        delta_DW = torch.linalg.solve(gram_WW + lift * eye_WW, target_DW.T).T
        return (column_DW.double() + delta_DW).to(column_DW.dtype)


COMPENSATIONS: dict[str, type[Compensation]] = {
    "ridge": Ridge,
    "bias": Bias,
    "none": NoCompensation,
}


def normal_equations(
    dense: DenseModel, windows_BT: Tokens, plan: ExpertPlan, expert: int
) -> list[tuple[Tensor, Tensor]]:
    """Return (H Hᵀ [W, W], P Hᵀ [D, W]) of every layer for one expert, summed in float64.

    H are the activations of its kept channels, P the output of those that neither it nor the shared
    expert keeps.
    """
    keep_LW, gone_LF = plan.keep_LEW[:, expert], plan.gone_mask(expert)
    width, size = keep_LW.shape[1], dense.downs[0].out_features
    sums = [
        (
            torch.zeros(width, width, dtype=torch.float64),
            torch.zeros(size, width, dtype=torch.float64),
        )
        for _ in dense.ffns
    ]

    def see(layer: int, _x_ND: Tensor, activation_NF: Tensor, _y_ND: Tensor) -> None:
        wide_NF = activation_NF.float()
        kept_NW, gone_F = wide_NF[:, keep_LW[layer]], gone_LF[layer]
        pruned_ND = wide_NF[:, gone_F] @ dense.downs[layer].weight[:, gone_F].float().T
        sums[layer][0].add_((kept_NW.T @ kept_NW).double().cpu())
        sums[layer][1].add_((pruned_ND.T @ kept_NW).double().cpu())

    observe(dense, windows_BT, see)
    return sums


def _own_columns(dense: DenseModel, plan: ExpertPlan, expert: int) -> list[Tensor]:
    pairs = zip(dense.downs, plan.keep_LEW[:, expert], strict=True)
    return [down.weight.detach().cpu()[:, keep_W] for down, keep_W in pairs]
