"""Greedy answers of many prompts at once, those of several clients too."""

from collections.abc import Sequence

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from pomona.data.examples import collate_prompts, padding_id
from pomona.models.frozen_experts import as_generation_knows
from pomona.models.placement import device_of


def greedy_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    batch_size: int = 32,
) -> list[str]:
    """Return the greedy answer to every prompt, at most `new_tokens` tokens, in the order given.

    Prompts of like length share a left-padded batch; decoding uses the KV cache.
    """
    return cohort_answers(model, tokenizer, [prompts], new_tokens, batch_size)[0]


@torch.no_grad()
def cohort_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[Sequence[int]]],
    new_tokens: int,
    batch_size: int = 32,
) -> list[list[str]]:
    """Return the greedy answers to every client's prompts, of which each client has at least one.

    As many of each client share a batch, client-major, so that what is hooked on for a cohort decodes them
    all at once; a client with fewer repeats its last one, unheard.
    """
    config = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=padding_id(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
    )
    orders = [sorted(range(len(own)), key=lambda i: len(own[i])) for own in prompts]
    each = max(1, batch_size // len(prompts))
    answers: list[dict[int, str]] = [{} for _ in prompts]
    device = device_of(model)
    for start in range(0, max(map(len, orders)), each):
        size = min(each, max(map(len, orders)) - start)
        chosen = [
            [order[min(place, len(order) - 1)] for place in range(start, start + size)]
            for order in orders
        ]
        flat = [own[i] for own, some in zip(prompts, chosen, strict=True) for i in some]
        ids_BT, mask_BT = collate_prompts(flat, padding_id(tokenizer))
        ids_BT, mask_BT = ids_BT.to(device), mask_BT.to(device)
        with as_generation_knows(model):
            output_BT = model.generate(  # pyright: ignore[reportCallIssue] - typed as a module
                input_ids=ids_BT, attention_mask=mask_BT, generation_config=config
            )
        said = iter(output_BT[:, ids_BT.shape[1] :])
        for own, some in zip(answers, chosen, strict=True):
            for i in some:
                own[i] = str(tokenizer.decode(next(said), skip_special_tokens=True)).strip()
    return [[own[i] for i in range(len(own))] for own in answers]
