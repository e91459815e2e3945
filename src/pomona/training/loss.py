"""Completion-only cross-entropy, one value per client."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as fn

from pomona.models.logits import labelled_logits
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
    nats_Z = fn.cross_entropy(logits_ZV.float(), input_ids_BT[row_Z, column_Z], reduction="none")
    return client_means(nats_Z, row_Z // (len(input_ids_BT) // clients), clients)
