"""What the rows of a cohort's step cost each client: answers, and the balance of the router."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from pomona.data.examples import Batch, Example, collate
from pomona.federation.cohort import FrozenBase
from pomona.models.routing import routed_by
from pomona.shapes import PerClient
from pomona.training.loss import balance_losses, completion_losses


def client_losses(
    base: FrozenBase,
    rows: Sequence[Sequence[Example]],
    clients: int,
    pad_id: int,
    router_loss: float = 0.0,
) -> PerClient:
    """Return each client's nats per answer token [C] on its rows of a step.

    `rows` are shared out among `clients` in their order: all who have rows, or every row a client of its own.
    `router_loss` times the load-balancing loss is in the gradient, and not in the loss that is told.
    """
    batch, real_B = _fill(rows, pad_id, base.device)
    with routed_by(base.sites if router_loss else ()) as routed:
        loss_C = completion_losses(
            base.model,
            batch.input_ids_BT,
            batch.attention_mask_BT,
            batch.label_mask_BT,
            clients,
        )
    if not routed:
        return loss_C
    counted_BT = batch.attention_mask_BT.bool() & real_B.unsqueeze(1)
    balance_C = router_loss * balance_losses(routed, counted_BT, clients)
    return loss_C + (balance_C - balance_C.detach())


def _fill(
    rows: Sequence[Sequence[Example]], pad_id: int, device: torch.device
) -> tuple[Batch, Bool[Tensor, " B"]]:
    """Collate client-major and tell the real rows; one added for alignment repeats one without its label."""
    size = max(map(len, rows))
    filled = [row for own in rows for row in [*own, *[own[0]] * (size - len(own))]]
    batch = collate(filled, pad_id).to(device)
    real_B = torch.tensor([k < len(own) for own in rows for k in range(size)], device=device)
    labels_BT = batch.label_mask_BT & real_B.unsqueeze(1)
    return Batch(batch.input_ids_BT, batch.attention_mask_BT, labels_BT), real_B
