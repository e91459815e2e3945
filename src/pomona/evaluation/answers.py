"""Greedy answers of many prompts at once."""

from collections.abc import Sequence

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from pomona.data.examples import collate_prompts, padding_id
from pomona.models.placement import device_of


@torch.no_grad()
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
    config = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=padding_id(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
    )
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: dict[int, str] = {}
    device = device_of(model)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        ids_BT, mask_BT = collate_prompts([prompts[i] for i in chosen], padding_id(tokenizer))
        output_BT = model.generate(  # pyright: ignore[reportCallIssue] - typed as a module
            input_ids=ids_BT.to(device), attention_mask=mask_BT.to(device), generation_config=config
        )
        for i, tokens in zip(chosen, output_BT[:, ids_BT.shape[1] :], strict=True):
            answers[i] = str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()
    return [answers[i] for i in range(len(prompts))]
