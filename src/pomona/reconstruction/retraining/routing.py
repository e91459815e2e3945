"""Routing during retraining: how tokens are sent, and what their balance costs."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pomona.models.routing import Routed


def soft(temperature: float) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return the dense routing of the first stage: every expert, weighted by softmax(logits / t)."""

    def route(logits_NE: Tensor, weights: Tensor, _index: Tensor) -> tuple[Tensor, Tensor]:
        weight_NE = (logits_NE.float() / temperature).softmax(dim=-1)
        every_E = torch.arange(logits_NE.shape[-1], device=logits_NE.device)
        return weight_NE.to(weights.dtype), every_E.expand(len(logits_NE), -1)

    return route


def straight_through(logits_NE: Tensor, weights: Tensor, index_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Leave the value of a single expert's weight at one and give it its probability's gradient."""
    if index_NK.shape[-1] > 1:
        return weights, index_NK
    chosen_N1 = logits_NE.float().softmax(dim=-1).gather(-1, index_NK)
    return (weights * chosen_N1 / chosen_N1.detach()).to(weights.dtype), index_NK


def balance_loss(routed: Sequence[Routed]) -> Tensor:
    """Return the mean over layers of E · Σ_e share of choices · mean probability; 1 is balanced.

    Fedus, Zoph & Shazeer, "Switch Transformers", JMLR 2022, equation 4.
    """
    losses: list[Tensor] = []
    for logits_NE, index_NK in routed:
        experts = logits_NE.shape[-1]
        share_E = torch.bincount(index_NK.flatten(), minlength=experts) / index_NK.numel()
        losses.append(experts * (share_E * logits_NE.float().softmax(dim=-1).mean(0)).sum())
    return torch.stack(losses).mean()


def z_loss(routed: Sequence[Routed]) -> Tensor:
    """Return the mean squared log-partition of the routers.

    Zoph et al., "ST-MoE: Designing Stable and Transferable Sparse Expert Models", 2022, equation 5.
    """
    values = [logits.float().logsumexp(dim=-1).square().mean() for logits, _ in routed]
    return torch.stack(values).mean()
