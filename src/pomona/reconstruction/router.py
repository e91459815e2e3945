"""Routers from data: a random router wastes what calibration already knows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as fn

from pomona.errors import PomonaError
from pomona.reconstruction.ffn import DenseModel, observe, sample_inputs
from pomona.reconstruction.outputs import OutputMoments, output_moments
from pomona.reconstruction.plan import ExpertPlan
from pomona.seeds import torch_generator
from pomona.shapes import Hidden, Tokens


@runtime_checkable
class Router(Protocol):
    """Makes the router rows of every layer."""

    def __call__(
        self,
        dense: DenseModel,
        windows: Sequence[Tensor],
        plan: ExpertPlan,
        columns: Sequence[Sequence[Tensor]],
        layers: range,
        seed: int,
    ) -> list[Tensor]:
        """Return the rows [E, D] of each of `layers`.

        `windows` are per expert; `columns[i][e]` [D, W] are what layer `layers[i]` has as `down_proj` of
        expert e.
        """
        ...


@dataclass(frozen=True)
class RandomRouter:
    """Normal rows, as the published DIVE has them.

    Attributes:
        deviation: Of a row's entries.
    """

    deviation: float = 0.02

    def __post_init__(self) -> None:
        if not self.deviation >= 0:
            raise PomonaError(f"deviation {self.deviation} is negative; use for example 0.02")

    def __call__(
        self,
        dense: DenseModel,
        windows: Sequence[Tensor],
        plan: ExpertPlan,
        columns: Sequence[Sequence[Tensor]],
        layers: range,
        seed: int,
    ) -> list[Tensor]:
        """Return random rows, a function of `seed`."""
        generator = torch_generator(seed, "router")
        shape = len(dense.ffns), plan.keep_LEW.shape[1], dense.hidden
        row_LED = torch.randn(shape, generator=generator) * self.deviation
        return [row_LED[layer] for layer in layers]


@dataclass(frozen=True)
class Centroids:
    """Row e is the direction of group e's mean FFN input away from the mean of all groups.

    Attributes:
        scale: Length of a row; with inputs of norm √D it sets how sharp the softmax is.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise PomonaError(f"scale {self.scale} is not positive; use for example 1.0")

    def __call__(
        self,
        dense: DenseModel,
        windows: Sequence[Tensor],
        plan: ExpertPlan,
        columns: Sequence[Sequence[Tensor]],
        layers: range,
        seed: int,
    ) -> list[Tensor]:
        """Return the centred, normalised mean inputs of every group."""
        groups = [_mean_inputs(dense, windows_BT, layers) for windows_BT in windows]
        rows: list[Tensor] = []
        for layer in layers:
            mean_ED = torch.stack([group[layer] for group in groups])
            rows.append(fn.normalize(mean_ED - mean_ED.mean(0), dim=1) * self.scale)
        return rows


@dataclass(frozen=True)
class Fitted:
    """Multinomial logistic regression onto every token's best experts.

    The best K experts of a token are found greedily: each next one is what brings the mean of the chosen
    closest to FFN(x). For K > 1 the rows are then scaled so that the softmax over the chosen, whose
    weights the experts get, leaves the least error.

    Attributes:
        tokens: At most so many tokens of each group.
        decay: Weight of ‖rows‖² in the fit.
        iterations: Of the fit, at most.
    """

    tokens: int = 4096
    decay: float = 1e-3
    iterations: int = 40

    def __post_init__(self) -> None:
        for name in ("tokens", "iterations"):
            if getattr(self, name) < 1:
                raise PomonaError(f"{name} {getattr(self, name)} is not positive; use 1 or more")
        if not self.decay >= 0:
            raise PomonaError(f"decay {self.decay} is negative; use 0 or for example 1e-3")

    def __call__(
        self,
        dense: DenseModel,
        windows: Sequence[Tensor],
        plan: ExpertPlan,
        columns: Sequence[Sequence[Tensor]],
        layers: range,
        seed: int,
    ) -> list[Tensor]:
        """Return each layer's fitted rows [E, D]."""
        inputs = sample_inputs(dense, windows, self.tokens * len(windows), layers)
        return [
            self.fit(x_ND, output_moments(dense, plan, layer, own, x_ND), plan.active)
            for layer, own, x_ND in zip(layers, columns, inputs, strict=True)
        ]

    def fit(self, x_ND: Hidden, moments: OutputMoments, active: int) -> Tensor:
        """Return one layer's rows [E, D]; the problem is convex, so there is no seed."""
        row_ED = self.regress(x_ND.float(), moments.best(active))
        if active == 1:
            return row_ED  # the weight of a single expert is one, however long the rows
        scores_NE = x_ND.float() @ row_ED.T
        errors = [
            float(moments.error(routing_weights(scale * scores_NE, active))) for scale in _SCALES
        ]
        return row_ED * _SCALES[min(range(len(_SCALES)), key=errors.__getitem__)]

    def regress(self, x_ND: Hidden, target_NE: Float[Tensor, "N E"]) -> Tensor:
        """Return rows [E, D] that minimise cross-entropy to the targets plus `decay` · ‖rows‖²."""
        experts, size = target_NE.shape[1], x_ND.shape[1]
        row_ED = torch.zeros(experts, size, device=x_ND.device, requires_grad=True)
        engine = torch.optim.LBFGS(
            [row_ED], max_iter=self.iterations, line_search_fn="strong_wolfe"
        )

        def objective() -> Tensor:
            engine.zero_grad()
            loss = fn.cross_entropy(x_ND @ row_ED.T, target_NE)
            loss = loss + self.decay * row_ED.square().sum()
            loss.backward()
            return loss

        engine.step(objective)
        return row_ED.detach()


_SCALES = (0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)


ROUTERS: dict[str, type[Router]] = {
    "fitted": Fitted,
    "centroids": Centroids,
    "random": RandomRouter,
}


def routing_weights(score_NE: Float[Tensor, "N E"], active: int) -> Float[Tensor, "N E"]:
    """Return every expert's weight: softmax over the `active` highest scores, 0 for the others."""
    best_NK, index_NK = score_NE.topk(active, dim=1)
    return torch.zeros_like(score_NE).scatter_(1, index_NK, best_NK.softmax(dim=1))


def _mean_inputs(dense: DenseModel, windows_BT: Tokens, layers: range) -> dict[int, Tensor]:
    sums = {layer: torch.zeros(dense.hidden) for layer in layers}

    def see(layer: int, x_ND: Tensor, _activation_NF: Tensor, _y_ND: Tensor) -> None:
        sums[layer] += x_ND.float().sum(0).cpu()

    observe(dense, windows_BT, see, layers)
    return {layer: total / windows_BT.numel() for layer, total in sums.items()}
