"""What training minimises, one value per client: completion-only cross-entropy, balance of the router."""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as fn

from pomona.errors import PomonaError
from pomona.models.experts import ExpertSite
from pomona.models.logits import labelled_logits
from pomona.models.routing import Routed
from pomona.models.split import Split
from pomona.shapes import AttentionMask, PerClient, TokenMask, Tokens


def client_means(
    value_Z: Float[Tensor, " Z"], client_Z: Int[Tensor, " Z"], clients: int
) -> PerClient:
    """Return the mean of each client's values; a client without any gets zero."""
    zeros_C = value_Z.new_zeros(clients)
    total_C = zeros_C.index_add(0, client_Z, value_Z)
    count_C = zeros_C.index_add(0, client_Z, torch.ones_like(value_Z))
    return total_C / count_C.clamp_min(1)


def completion_losses(
    model: torch.nn.Module,
    input_ids_BT: Tokens,
    attention_mask_BT: AttentionMask,
    label_mask_BT: TokenMask,
    clients: int,
) -> PerClient:
    """Return each client's mean nats per answer token [C]; rows are client-major.

    Their sum is the cohort's loss: clients' parameters are disjoint, so its gradient is each
    client's own. Logits are computed at answer tokens only.
    """
    logits_ZV = labelled_logits(model, input_ids_BT, attention_mask_BT, label_mask_BT)
    row_Z, column_Z = label_mask_BT.nonzero(as_tuple=True)
    client_Z = row_Z // (len(input_ids_BT) // clients)
    token_Z = input_ids_BT[row_Z, column_Z]
    nats_Z = fn.cross_entropy(logits_ZV.float(), token_Z, reduction="none")
    return client_means(nats_Z, client_Z, clients)


def balance_losses(
    routed: Sequence[Routed], counted_N: Bool[Tensor, " N"], split: Split
) -> PerClient:
    """Return each client's load-balancing loss [C] over its counted tokens.

    E · Σ_e (choices of e per token) · (mean probability of e), both over all layers at once, K when balanced:
    what transformers' mixtures add to their loss (`load_balancing_loss_func`), after Fedus, Zoph & Shazeer,
    "Switch Transformers", JMLR 2022, equations 4 to 6. A client without tokens gets zero.
    """

    def per_client(value_NE: Tensor) -> Float[Tensor, "C E"]:
        zeros_CE = value_NE.new_zeros(len(split.sizes), value_NE.shape[1])
        return zeros_CE.index_add(0, client_N, value_NE * counted_N1)

    counted_N1 = counted_N.unsqueeze(1).to(routed[0][0].device, torch.float32)
    client_N = split.client_N.to(counted_N1.device)
    chosen_CE = share_CE = torch.zeros((), device=counted_N1.device)
    for logits, index_NK in routed:
        probability_NE = logits.to(counted_N1.device).softmax(dim=-1)
        best_NK = probability_NE.topk(index_NK.shape[-1], dim=-1).indices
        chosen_NE = torch.zeros_like(probability_NE, dtype=torch.float32).scatter(1, best_NK, 1.0)
        chosen_CE = chosen_CE + per_client(chosen_NE)
        share_CE = share_CE + per_client(probability_NE.float())
    tokens_C1 = len(routed) * per_client(torch.ones_like(counted_N1)).clamp_min(1)
    return share_CE.shape[1] * (chosen_CE / tokens_C1 * share_CE / tokens_C1).sum(1)


def balance_weight(
    model: torch.nn.Module, sites: Sequence[ExpertSite], asked: float | Literal["model"]
) -> float:
    """Return the factor of `balance_losses` in a client's loss: as asked, or as the model has it.

    Raises `PomonaError` where one is asked of a model that defines no such loss: a dense one, or a
    mixture that is balanced in another way.
    """
    if asked == 0:
        return 0.0
    routers = [site.router for site in sites]
    if not routers or None in routers or not hasattr(model, "router_aux_loss_coef"):
        raise PomonaError(
            f"{type(model).__name__} defines no load-balancing loss of a router; leave local.router_loss out"
        )
    return float(model.router_aux_loss_coef or 0.0) if asked == "model" else asked  # pyright: ignore
