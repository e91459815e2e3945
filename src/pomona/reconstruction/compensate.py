"""What the kept channels of an expert do for the pruned ones.

DIVE compensates with FLAP's bias on `down_proj`, for which no stock mixture has a home; the default
here is the bias-free least-squares refit.
"""

from collections.abc import Callable, Sequence
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

    def scaled(self, gain: float) -> "Refit":
        """Return the refit whose columns are multiplied by `gain`."""
        return self if gain == 1 else Refit(self.column_DW * gain, self.bias_D)


@runtime_checkable
class Compensation(Protocol):
    """Gives an expert the `down_proj` columns of its kept channels."""

    @property
    def biased(self) -> bool:
        """Whether it also gives a bias, which few formats can hold."""
        ...

    def __call__(
        self,
        dense: DenseModel,
        windows_BT: Tokens,
        plan: ExpertPlan,
        expert: int,
        layers: range,
    ) -> Sequence[Refit]:
        """Return the refit of each of `layers`, given the windows of the expert's group."""
        ...


@dataclass(frozen=True)
class NoCompensation:
    """The dense columns as they are."""

    @property
    def biased(self) -> bool:
        """No bias."""
        return False

    def __call__(
        self,
        dense: DenseModel,
        windows_BT: Tokens,
        plan: ExpertPlan,
        expert: int,
        layers: range,
    ) -> Sequence[Refit]:
        """Return each layer's own columns."""
        return [Refit(own_columns(dense, plan, expert, layer)) for layer in layers]


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
        self,
        dense: DenseModel,
        windows_BT: Tokens,
        plan: ExpertPlan,
        expert: int,
        layers: range,
    ) -> Sequence[Refit]:
        """Return each layer's own columns and the bias."""
        sums = {layer: torch.zeros(dense.channels, dtype=torch.float64) for layer in layers}

        def see(layer: int, _x_ND: Tensor, activation_NF: Tensor, _y_ND: Tensor) -> None:
            sums[layer] += activation_NF.double().sum(0).cpu()

        observe(dense, windows_BT, see, layers)
        refits: list[Refit] = []
        for layer, sum_F in sums.items():
            gone_F = plan.gone_F(layer, expert)
            mean_F = gone_F * sum_F / windows_BT.numel()
            bias_D = dense.down_DF(layer).double().cpu() @ mean_F
            refits.append(Refit(own_columns(dense, plan, expert, layer), bias_D))
        return refits


@dataclass(frozen=True)
class Ridge:
    """down' = Y Hᵀ (H Hᵀ + λ I)⁻¹ with H the kept activations [W, N] and Y the dense output [D, N].

    Only the sums H Hᵀ [W, W] and P Hᵀ [D, W] are kept, P being the output of the pruned channels:
    never an activation.

    Attributes:
        penalty: λ relative to the mean diagonal of H Hᵀ; it pulls towards the dense columns, which are the
            exact solution when nothing is pruned.
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
        self,
        dense: DenseModel,
        windows_BT: Tokens,
        plan: ExpertPlan,
        expert: int,
        layers: range,
    ) -> Sequence[Refit]:
        """Return each layer's refitted columns."""
        sums = normal_equations(dense, windows_BT, plan, expert, layers)
        refits: list[Refit] = []
        for layer in layers:
            column_DW = own_columns(dense, plan, expert, layer)
            refits.append(Refit(self.refit(column_DW, *sums.pop(layer))))
        return refits

    def refit(self, column_DW: Tensor, gram_WW: Tensor, target_DW: Tensor) -> Tensor:
        """Return one layer's columns: the dense ones plus what the pruned channels can be told by.

        Writing down' = down[:, keep] + Δ, the ridge problem for Δ has the pruned channels' output P
        as its target.
        """
        return (column_DW + self.solver(gram_WW)(target_DW)).to(column_DW)

    def solver(self, gram_WW: Tensor) -> Callable[[Tensor], Tensor]:
        """Return what maps targets [D, W] to Δ [D, W] with Δ (H Hᵀ + λ I) = target, in float64."""
        lifted_WW = gram_WW.double()
        lift = self.penalty * lifted_WW.diagonal().mean().clamp_min(1e-30)
        factor_WW = torch.linalg.cholesky(lifted_WW + lift * torch.eye(len(gram_WW)).to(lifted_WW))

        def solve(target_DW: Tensor) -> Tensor:
            solution_WD = torch.cholesky_solve(target_DW.double().T, factor_WW)
            return solution_WD.T.to(target_DW.dtype)

        return solve


COMPENSATIONS: dict[str, type[Compensation]] = {
    "ridge": Ridge,
    "bias": Bias,
    "none": NoCompensation,
}


def normal_equations(
    dense: DenseModel, windows_BT: Tokens, plan: ExpertPlan, expert: int, layers: range
) -> dict[int, tuple[Tensor, Tensor]]:
    """Return (H Hᵀ [W, W], P Hᵀ [D, W]) of each of `layers` for one expert, summed in float64.

    H are the activations of its kept channels, P the output of those that neither it nor the shared
    expert keeps.
    """
    width = plan.keep_LEW.shape[2]
    sums = {
        layer: (zeros64(width, width, dense.device), zeros64(dense.hidden, width, dense.device))
        for layer in layers
    }

    def see(layer: int, _x_ND: Tensor, activation_NF: Tensor, _y_ND: Tensor) -> None:
        wide_NF = activation_NF.float()
        gone_F = plan.gone_F(layer, expert)
        kept_NW = wide_NF[:, plan.keep_LEW[layer, expert]]
        pruned_ND = wide_NF[:, gone_F] @ dense.down_DF(layer)[:, gone_F].float().T
        gram_WW, target_DW = sums[layer]
        gram_WW.add_(kept_NW.T @ kept_NW)
        target_DW.add_(pruned_ND.T @ kept_NW)

    observe(dense, windows_BT, see, layers)
    return sums


def zeros64(rows: int, columns: int, device: torch.device) -> Tensor:
    """Return a sum in float64 that starts at zero."""
    return torch.zeros(rows, columns, dtype=torch.float64, device=device)


def own_columns(dense: DenseModel, plan: ExpertPlan, expert: int, layer: int) -> Tensor:
    """Return the dense columns of an expert's channels [D, W]."""
    return dense.down_DF(layer)[:, plan.keep_LEW[layer, expert]]
