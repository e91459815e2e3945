"""A round of federated LoRA as one writes it with PEFT and transformers: client after client, one model.

The adapter is set for every client, its rows are padded to the longest of a batch, the model computes its own
loss, and the clients' adapters are averaged.
"""

from collections.abc import Mapping, Sequence

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils import set_peft_model_state_dict
from torch import Tensor
from transformers import PreTrainedModel

Padded = Mapping[str, Tensor]
"""A batch as transformers' collators give it: input_ids, attention_mask, labels (−100 for the prompt)."""


def with_adapter(
    model: PreTrainedModel, rank: int, alpha: float, targets: Sequence[str]
) -> PeftModel:
    """Return a model with LoRA to train."""
    config = LoraConfig(
        r=rank, lora_alpha=int(alpha), target_modules=list(targets), task_type="CAUSAL_LM"
    )
    tuned = get_peft_model(model, config)
    tuned.train()
    return tuned


def train(model: PeftModel, shared: Mapping[str, Tensor], batches: Sequence[Padded], rate: float):
    """Train one client from the shared adapter; return its own adapter and its losses."""
    set_peft_model_state_dict(model, dict(shared))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    losses: list[float] = []
    for batch in batches:
        loss = model(**{name: value.to(model.device) for name, value in batch.items()}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    own = get_peft_model_state_dict(model)
    return {n: v.detach().float().cpu().clone() for n, v in own.items()}, losses


def round_of(
    model: PeftModel,
    shared: Mapping[str, Tensor],
    clients: Sequence[Sequence[Padded]],
    rate: float,
) -> tuple[dict[str, Tensor], list[list[float]]]:
    """Return the mean of the clients' adapters after a round, and their losses."""
    trained = [train(model, shared, batches, rate) for batches in clients]
    mean = {n: torch.stack([own[n] for own, _ in trained]).mean(0) for n in trained[0][0]}
    return mean, [losses for _, losses in trained]
