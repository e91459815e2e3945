"""Routers from data: a random router wastes what calibration already knows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as fn

from pomona.reconstruction.ffn import DenseModel, observe
from pomona.reconstruction.plan import ExpertPlan
from pomona.seeds import torch_generator
from pomona.shapes import Tokens


@runtime_checkable
class Router(Protocol):
    """Makes the router rows of every layer."""

    def __call__(
        self,
        dense: DenseModel,
        windows: Sequence[Tensor],
        plan: ExpertPlan,
        downs: Sequence[Sequence[Tensor]],
        seed: int,
    ) -> list[Tensor]:
        """Return each layer's rows [E, D]; `windows` are per expert, `downs[l][e]` [D, W]."""
        ...


@dataclass(frozen=True)
class RandomRouter:
    """Normal rows, as the published DIVE has them."""

    deviation: float = 0.02

    def __call__(
        self,
        dense: DenseModel,
        windows: Sequence[Tensor],
        plan: ExpertPlan,
        downs: Sequence[Sequence[Tensor]],
        seed: int,
    ) -> list[Tensor]:
        """Return random rows, a function of `seed`."""
        generator = torch_generator(seed, "router")
        shape = plan.keep_LEW.shape[1], dense.downs[0].out_features
        return [torch.randn(shape, generator=generator) * self.deviation for _ in dense.ffns]


@dataclass(frozen=True)
class Centroids:
    """Row e is the direction of group e's mean FFN input away from the mean of all groups.

    `scale` is the length of a row; with inputs of norm √D it sets how sharp the softmax is.
    """

    scale: float = 1.0

    def __call__(
        self,
        dense: DenseModel,
        windows: Sequence[Tensor],
        plan: ExpertPlan,
        downs: Sequence[Sequence[Tensor]],
        seed: int,
    ) -> list[Tensor]:
        """Return the centred, normalised mean inputs of every group."""
        groups = [_mean_inputs(dense, windows_BT) for windows_BT in windows]
        rows: list[Tensor] = []
        for layer in range(len(dense.ffns)):
            mean_ED = torch.stack([group[layer] for group in groups])
            rows.append(fn.normalize(mean_ED - mean_ED.mean(0), dim=1) * self.scale)
        return rows


@dataclass(frozen=True)
class Fitted:
    """Multinomial logistic regression onto every token's best expert.

    The best expert of a token is argmin_e ‖E_e(x) − FFN(x)‖². `tokens` caps how many tokens of each
    group are used, `decay` is the weight of ‖rows‖² in the fit.
    """

    tokens: int = 4096
    decay: float = 1e-3
    iterations: int = 60

    def __call__(
        self,
        dense: DenseModel,
        windows: Sequence[Tensor],
        plan: ExpertPlan,
        downs: Sequence[Sequence[Tensor]],
        seed: int,
    ) -> list[Tensor]:
        """Return each layer's fitted rows [E, D]."""
        inputs: list[list[Tensor]] = [[] for _ in dense.ffns]
        best: list[list[Tensor]] = [[] for _ in dense.ffns]

        def see(layer: int, x_ND: Tensor, activation_NF: Tensor, y_ND: Tensor) -> None:
            inputs[layer].append(x_ND.float())
            shared_S = plan.shared_LS[layer]
            shared_ND = activation_NF[:, shared_S] @ dense.downs[layer].weight[:, shared_S].T
            error_NE = expert_errors(
                activation_NF, y_ND - shared_ND, plan.keep_LEW[layer], downs[layer], plan.gain
            )
            best[layer].append(error_NE.argmin(1))

        for windows_BT in windows:
            observe(dense, windows_BT[: max(1, self.tokens // windows_BT.shape[1])], see)
        experts = plan.keep_LEW.shape[1]
        return [
            self.fit(torch.cat(x), torch.cat(e), experts) for x, e in zip(inputs, best, strict=True)
        ]

    def fit(self, x_ND: Tensor, best_N: Tensor, experts: int) -> Tensor:
        """Return rows [E, D] that minimise cross-entropy plus `decay` · ‖rows‖²; convex, so no seed."""
        row_ED = torch.zeros(experts, x_ND.shape[1], requires_grad=True)
        engine = torch.optim.LBFGS(
            [row_ED], max_iter=self.iterations, line_search_fn="strong_wolfe"
        )

        def objective() -> Tensor:
            engine.zero_grad()
            loss = fn.cross_entropy(x_ND @ row_ED.T, best_N) + self.decay * row_ED.square().sum()
            loss.backward()
            return loss

        engine.step(objective)
        return row_ED.detach()


ROUTERS: dict[str, type[Router]] = {
    "fitted": Fitted,
    "centroids": Centroids,
    "random": RandomRouter,
}


def expert_errors(
    activation_NF: Tensor,
    y_ND: Tensor,
    keep_EW: Tensor,
    down_of: Sequence[Tensor],
    gain: float = 1.0,
) -> Tensor:
    """Return ‖gain · E_e(x) − y‖² of every token and expert, [N, E].

    An expert's activation is the dense one at its kept channels.
    """
    errors = [
        (gain * (activation_NF[:, keep_W] @ down_DW.to(activation_NF.dtype).T) - y_ND)
        .float()
        .square()
        .sum(1)
        for keep_W, down_DW in zip(keep_EW, down_of, strict=True)
    ]
    return torch.stack(errors, dim=1)


def _mean_inputs(dense: DenseModel, windows_BT: Tokens) -> list[Tensor]:
    sums = [torch.zeros(down.out_features) for down in dense.downs]

    def see(layer: int, x_ND: Tensor, _activation_NF: Tensor, _y_ND: Tensor) -> None:
        sums[layer] += x_ND.float().sum(0)

    observe(dense, windows_BT, see)
    return [total / windows_BT.numel() for total in sums]
