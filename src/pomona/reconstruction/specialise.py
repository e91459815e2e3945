"""Experts specialise on the tokens that their router sends them.

DIVE gives an expert what matters to its domains, but a router chooses by token. From there on, rounds of
three steps, each layer by itself: who serves which tokens decides which channels an expert keeps; these
decide its `down_proj`; and what the experts then say decides the router. It is Lloyd's algorithm with
pruned FFNs in place of centroids and a linear router in place of the nearest one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from pomona.errors import PomonaError
from pomona.reconstruction.compensate import Refit, Ridge
from pomona.reconstruction.ffn import DenseModel, through_ffn
from pomona.reconstruction.outputs import output_moments, routed_targets
from pomona.reconstruction.plan import ExpertPlan
from pomona.reconstruction.router import Fitted, routing_weights
from pomona.shapes import Hidden


@dataclass(frozen=True)
class LayerExperts:
    """One layer's experts: kept channels [E, W], `down_proj` of each, router rows [E, D]."""

    keep_EW: Tensor = field(repr=False)
    refits: Sequence[Refit] = field(repr=False)
    router_ED: Tensor = field(repr=False)


@dataclass(frozen=True)
class Specialise:
    """Experts specialise on the tokens that the router sends them.

    Attributes:
        rounds: How often channels, weights and router are chosen anew; 0 leaves DIVE's experts.
        tokens: Tokens per layer, about.
        sweeps: How often one expert after the other is solved for, given those that serve the same tokens.
    """

    rounds: int = 3
    tokens: int = 32768
    sweeps: int = 3

    def __post_init__(self) -> None:
        if self.rounds < 0:
            raise PomonaError(f"rounds {self.rounds} is negative; use 0 to leave them out")
        for name in ("tokens", "sweeps"):
            if getattr(self, name) < 1:
                raise PomonaError(f"{name} {getattr(self, name)} is not positive; use 1 or more")

    def __call__(
        self,
        dense: DenseModel,
        plan: ExpertPlan,
        layer: int,
        x_ND: Hidden,
        start: LayerExperts,
        ridge: Ridge,
        router: Fitted,
    ) -> LayerExperts:
        """Return one layer's experts after all rounds, given FFN inputs of all groups."""
        made = start
        for _ in range(self.rounds):
            weight_NE = routing_weights(x_ND.float() @ made.router_ED.T, plan.active)
            energy_EEF = shared_energy(dense, layer, x_ND, weight_NE > 0)
            keep_EW = deal_channels(energy_EEF, made.keep_EW, plan.shared_LS[layer])
            plan = with_channels(plan, layer, keep_EW)
            columns = joint_columns(dense, plan, layer, x_ND, weight_NE, ridge, self.sweeps)
            moments = output_moments(dense, plan, layer, columns, x_ND)
            row_ED = router.fit(x_ND, moments, plan.active)
            made = LayerExperts(keep_EW, [Refit(column_DW) for column_DW in columns], row_ED)
        return made


def with_channels(plan: ExpertPlan, layer: int, keep_EW: Tensor) -> ExpertPlan:
    """Return the plan with other channels in one layer."""
    keep_LEW = plan.keep_LEW.clone()
    keep_LEW[layer] = keep_EW
    return replace(plan, keep_LEW=keep_LEW)


def shared_energy(
    dense: DenseModel, layer: int, x_ND: Hidden, serves_NE: Tensor
) -> Float[Tensor, "E E F"]:
    """Return Σ (activation · ‖down column‖)² of every channel over the tokens that two experts both serve.

    On the diagonal those of one expert.
    """
    norm_F = dense.down_DF(layer).float().square().sum(0)
    experts = serves_NE.shape[1]
    energy_EEF = torch.zeros(experts, experts, dense.channels, dtype=torch.float64)
    for rows, activation_nF, _y_nD in through_ffn(dense, layer, x_ND):
        energy_nF = activation_nF.float().square() * norm_F
        serves_nE = serves_NE[rows].to(energy_nF.dtype)
        for expert, own_n in enumerate(serves_NE[rows].T):
            energy_EEF[expert] += (serves_nE[own_n].T @ energy_nF[own_n]).double().cpu()
    return energy_EEF


def deal_channels(energy_EEF: Float[Tensor, "E E F"], keep_EW: Tensor, shared_S: Tensor) -> Tensor:
    """Return each expert's channels [E, W], ascending: the most energy that no partner already gives.

    Experts choose in turn, so that two that serve a token together do not both keep a channel for it. An
    expert that serves no token keeps what it has.
    """
    experts, width = keep_EW.shape
    held_EF = torch.zeros(experts, energy_EEF.shape[2], dtype=energy_EEF.dtype)
    held_EF.scatter_(1, keep_EW, 1.0)
    for expert in range(experts):
        if not energy_EEF[expert, expert].any():
            continue
        partners_EF = held_EF.clone()
        partners_EF[expert] = 0
        left_F = energy_EEF[expert, expert] - (energy_EEF[expert] * partners_EF).sum(0)
        left_F[shared_S] = -torch.inf
        held_EF[expert] = 0
        held_EF[expert, left_F.topk(width).indices] = 1
    return held_EF.nonzero()[:, 1].view(experts, width)


def joint_columns(
    dense: DenseModel,
    plan: ExpertPlan,
    layer: int,
    x_ND: Hidden,
    weight_NE: Float[Tensor, "N E"],
    ridge: Ridge,
    sweeps: int,
) -> list[Tensor]:
    """Return each expert's `down_proj` [D, W] so that their weighted sum is closest to the target.

    Block coordinate descent on min ‖Σ_e w_e E_e(x) − target‖² with `ridge`'s penalty, which pulls an
    expert towards its dense columns, times what `dense_share` says.
    """
    keep_EW, down_DF = plan.keep_LEW[layer], dense.down_DF(layer).float()
    share_EF = dense_share(keep_EW, weight_NE > 0, dense.channels).to(down_DF)
    prior = [
        down_DF[:, keep_W] * share_F[keep_W]
        for keep_W, share_F in zip(keep_EW, share_EF, strict=True)
    ]
    grams, left = _joint_equations(dense, plan, layer, x_ND, weight_NE, prior)
    solve = [ridge.solver(grams[expert, expert]) for expert in range(len(prior))]
    change = [torch.zeros_like(own_DW) for own_DW in prior]
    for _ in range(sweeps if plan.active > 1 else 1):
        for expert, left_DW in enumerate(left):
            others = [p for p in range(len(prior)) if p != expert and (p, expert) in grams]
            taken_DW = sum(
                (change[p] @ grams[p, expert] for p in others), torch.zeros_like(left_DW)
            )
            change[expert] = solve[expert](left_DW - taken_DW)
    return [(own + more).to(dense.model.dtype) for own, more in zip(prior, change, strict=True)]


def dense_share(keep_EW: Tensor, serves_NE: Tensor, channels: int) -> Float[Tensor, "E F"]:
    """Return how much of a channel's dense column an expert has to give, in units of its weight's 1 / K.

    K experts of weight about 1 / K serve a token: K if the others never hold the channel, 1 if all do.
    An expert that serves no token may meet any other.
    """
    serves_NE = serves_NE.double()
    active, experts = int(serves_NE[0].sum()), len(keep_EW)
    together_EE = serves_NE.T @ serves_NE
    served_E = together_EE.diagonal().clone()
    together_EE /= served_E.clamp_min(1).unsqueeze(1)
    together_EE[served_E == 0] = (active - 1) / max(1, experts - 1)
    held_EF = torch.zeros(experts, channels, dtype=torch.float64)
    held_EF.scatter_(1, keep_EW, 1.0)
    return active / (together_EE.fill_diagonal_(1.0).cpu() @ held_EF).clamp_min(1.0)


def _joint_equations(
    dense: DenseModel,
    plan: ExpertPlan,
    layer: int,
    x_ND: Hidden,
    weight_NE: Tensor,
    prior: Sequence[Tensor],
) -> tuple[dict[tuple[int, int], Tensor], list[Tensor]]:
    """Return {(e, p): H_eᵀ H_p [W, W]} of experts that serve a token together, and leftᵀ H_e [D, W].

    H_e are the activations of expert e's channels times its routing weights, left is what the `prior`
    columns of all leave of the target. In float32: of some thousand tokens, and there are E² / 2 of them.
    """
    _, experts, width = plan.keep_LEW.shape
    grams = {(e, e): torch.zeros(width, width, device=x_ND.device) for e in range(experts)}
    left = [torch.zeros(dense.hidden, width, device=x_ND.device) for _ in range(experts)]
    for rows, activation_nF, target_nD in routed_targets(dense, plan, layer, x_ND):
        weight_nE = weight_NE[rows]
        place_nE = (weight_nE > 0).cumsum(0) - 1  # of a token among those of an expert
        inputs: list[Tensor] = []
        for e in range(experts):
            own_n = weight_nE[:, e].nonzero()[:, 0]
            keep_W = plan.keep_LEW[layer, e].to(own_n.device)
            own_nW = activation_nF[own_n.unsqueeze(1), keep_W] * weight_nE[own_n, e : e + 1]
            grams[e, e] += own_nW.T @ own_nW
            target_nD[own_n] -= own_nW @ prior[e].T
            for p, other_nW in enumerate(inputs):
                both_n = weight_nE[own_n, p] > 0
                if both_n.any():
                    other_nW = other_nW[place_nE[own_n[both_n], p]]
                    if (p, e) not in grams:
                        grams[p, e] = torch.zeros(width, width, device=x_ND.device)
                    grams[p, e] += other_nW.T @ own_nW[both_n]
            inputs.append(own_nW)
        for e, own_nW in enumerate(inputs):
            left[e] += target_nD[weight_nE[:, e] > 0].T @ own_nW
    grams |= {(p, e): gram_WW.T for (e, p), gram_WW in grams.items() if e != p}
    return grams, left
