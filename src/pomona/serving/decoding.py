"""Answers to several prompts at once, each by a client's own model and drawn in its own way."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from pomona.data.examples import collate_prompts, padding_id
from pomona.federation.cohort import FrozenBase
from pomona.federation.update import ClientState, stack
from pomona.models.frozen_experts import as_generation_knows
from pomona.serving.asked import Asked
from pomona.shapes import Tokens

Hear = Callable[[int, int], bool]
"""Told the row and every token of its answer; returns whether the answer is over."""


@torch.no_grad()
def decode(
    base: FrozenBase,
    states: Sequence[ClientState],
    asked: Sequence[Asked],
    tokenizer: PreTrainedTokenizerBase,
    hear: Hear,
) -> None:
    """Answer every prompt by the client's model beside it, all in one batch, a token of each at a time.

    A client may stand there several times. `hear` is told tokens as they come, the end token too.
    """
    ids_BT, mask_BT = collate_prompts([one.prompt for one in asked], padding_id(tokenizer))
    ends = end_tokens(base, tokenizer)
    drawing = _Drawing(asked)
    hearing = _Hearing(asked, ids_BT.shape[1], ends, hear)
    config = GenerationConfig(
        max_new_tokens=max(one.new_tokens for one in asked),
        do_sample=False,  # `_Drawing` leaves one token each
        eos_token_id=sorted(ends),
        pad_token_id=padding_id(tokenizer),
        bos_token_id=cast(Any, tokenizer.bos_token_id),
    )
    plain = [replace(state, memory={}) for state in states]
    with base.attach(stack(plain)), as_generation_knows(base.model):
        base.model.generate(  # pyright: ignore[reportCallIssue] - typed as a module
            input_ids=ids_BT.to(base.device),
            attention_mask=mask_BT.to(base.device),
            generation_config=config,
            logits_processor=LogitsProcessorList([drawing]),
            stopping_criteria=StoppingCriteriaList([hearing]),
        )


def end_tokens(base: FrozenBase, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the tokens that end an answer: the tokenizer's, and those of the model's own configuration."""
    told = cast(Any, base.model.generation_config).eos_token_id
    own = told if isinstance(told, list) else [told]
    ends = {cast(int, tokenizer.eos_token_id), *cast(list[int | None], own)}
    return {end for end in ends if end is not None}


class _Drawing(LogitsProcessor):
    """Draws every row's next token by its own rule and generator, and leaves it as the only one."""

    def __init__(self, asked: Sequence[Asked]):
        self._asked = asked
        self._drawn = [torch.Generator().manual_seed(one.seed) for one in asked]

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride] - narrower shapes
        self, input_ids: Tokens, scores: Float[Tensor, "B V"]
    ) -> Float[Tensor, "B V"]:
        for row, one in enumerate(self._asked):
            if one.temperature > 0:
                token = drawn(scores[row].float().cpu(), one, self._drawn[row])
                scores[row] = -torch.inf
                scores[row, token] = 0.0
        return scores


def drawn(scores_V: Float[Tensor, " V"], asked: Asked, generator: torch.Generator) -> int:
    """Return a token drawn from the likeliest that hold the share `top_p`, at least one."""
    chances_V = torch.softmax((scores_V.double() - scores_V.max()) / asked.temperature, 0)
    sorted_V, order_V = chances_V.sort(descending=True, stable=True)
    kept_V = sorted_V.cumsum(0) - sorted_V < asked.top_p
    place = torch.multinomial(sorted_V * kept_V, 1, generator=generator)
    return int(order_V[place])


class _Hearing(StoppingCriteria):
    """Hands on what each row has got, and says which rows are over."""

    def __init__(self, asked: Sequence[Asked], begin: int, ends: set[int], hear: Hear):
        self._asked, self._begin, self._ends, self._hear = asked, begin, ends, hear
        self._over = [False] * len(asked)

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride] - narrower shapes
        self, input_ids: Tokens, scores: object, **_given: object
    ) -> Bool[Tensor, " B"]:
        said = input_ids.shape[1] - self._begin
        for row, token in enumerate(input_ids[:, -1].tolist()):
            if not self._over[row]:
                over = self._hear(row, token)
                full = said >= self._asked[row].new_tokens
                self._over[row] = over or full or token in self._ends
        return torch.tensor(self._over, device=input_ids.device)
