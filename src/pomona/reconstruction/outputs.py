"""What the experts of a layer say of each token, beside what the dense FFN says."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from pomona.reconstruction.ffn import DenseModel, through_ffn
from pomona.reconstruction.plan import ExpertPlan
from pomona.shapes import Hidden


@dataclass(frozen=True)
class OutputMoments:
    """Inner products of the experts' outputs with each other and with the target, token by token.

    They give the error of every way of routing without the outputs themselves.
    """

    gram_NEE: Float[Tensor, "N E E"] = field(repr=False)
    target_NE: Float[Tensor, "N E"] = field(repr=False)

    def error(self, weight_NE: Float[Tensor, "N E"]) -> Tensor:
        """Return Σ_n ‖Σ_e w_e E_e(x) − target‖², less what no weights change, ‖target‖²."""
        square = torch.einsum("ne,nef,nf->", weight_NE, self.gram_NEE, weight_NE)
        return square - 2 * (weight_NE * self.target_NE).sum()

    def best(self, active: int) -> Float[Tensor, "N E"]:
        """Return 1 / active for the experts whose mean is closest to the target, chosen greedily."""
        count, experts = self.target_NE.shape
        chosen_NE = torch.zeros_like(self.target_NE)
        overlap_NE = torch.zeros_like(self.target_NE)  # of every expert with the sum of the chosen
        rows = torch.arange(count, device=chosen_NE.device)
        own_NE = self.gram_NEE.diagonal(dim1=1, dim2=2)
        for _ in range(min(active, experts)):
            change_NE = own_NE / active + 2 * overlap_NE / active - 2 * self.target_NE
            index_N = change_NE.masked_fill(chosen_NE > 0, torch.inf).argmin(1)
            chosen_NE[rows, index_N] = 1 / active
            overlap_NE = overlap_NE + self.gram_NEE[rows, index_N]
        return chosen_NE


def output_moments(
    dense: DenseModel,
    plan: ExpertPlan,
    layer: int,
    columns: Sequence[Tensor],
    x_ND: Hidden,
) -> OutputMoments:
    """Return the moments of a layer's experts over FFN inputs; `columns` [D, W] per expert.

    The target is the dense output without what the shared channels give. An expert's activation is the
    dense one at its kept channels.
    """
    grams: list[Tensor] = []
    targets: list[Tensor] = []
    for _rows, activation_nF, target_nD in routed_targets(dense, plan, layer, x_ND):
        output_nED = torch.stack(
            [
                activation_nF[:, keep_W] @ own_DW.to(activation_nF).T
                for keep_W, own_DW in zip(plan.keep_LEW[layer], columns, strict=True)
            ],
            dim=1,
        )
        grams.append(output_nED @ output_nED.mT)
        targets.append((output_nED @ target_nD.unsqueeze(2)).squeeze(2))
    return OutputMoments(torch.cat(grams), torch.cat(targets))


def routed_targets(
    dense: DenseModel, plan: ExpertPlan, layer: int, x_ND: Hidden
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield (rows, activation_nF, target_nD) in float32, batch by batch: what the experts have to give.

    That is the dense output without what the shared channels give.
    """
    shared_S = plan.shared_LS[layer]
    shared_DS = dense.down_DF(layer)[:, shared_S].float()
    for rows, activation_nF, y_nD in through_ffn(dense, layer, x_ND):
        wide_nF = activation_nF.float()
        yield rows, wide_nF, y_nD.float() - wide_nF[:, shared_S] @ shared_DS.T
