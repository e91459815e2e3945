"""What retraining minimises."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as fn
from transformers import PreTrainedModel

from pomona.models.routing import Routed
from pomona.reconstruction.retraining.routing import balance_loss, z_loss
from pomona.reconstruction.retraining.settings import Objective
from pomona.shapes import Tokens


def language_loss(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    input_ids_BT: Tokens,
    objective: Objective,
) -> Tensor:
    """Return nats per token: KL(dense ‖ mixture), or the next token's cross-entropy without a teacher."""
    logits = student(input_ids=input_ids_BT, use_cache=False).logits[:, :-1].flatten(0, 1).float()
    if teacher is None:
        return fn.cross_entropy(logits, input_ids_BT[:, 1:].flatten())
    with torch.no_grad():
        target = teacher(input_ids=input_ids_BT, use_cache=False).logits[:, :-1].flatten(0, 1)
        target = (target.float() / objective.temperature).log_softmax(-1)
    own = (logits / objective.temperature).log_softmax(-1)
    divergence = fn.kl_div(own, target, reduction="batchmean", log_target=True)
    return divergence * objective.temperature**2


def router_loss(routed: Sequence[Routed], objective: Objective) -> Tensor | float:
    """Return the weighted balance and z losses of a forward pass; 0 where there is no router."""
    if not routed:
        return 0.0
    return objective.balance * balance_loss(routed) + objective.z * z_loss(routed)
