"""What is measured of one client's model: answer loss, answers, routing, gates."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from pomona.data.examples import Example, collate, encode_prompt
from pomona.data.rows import Row
from pomona.data.templates import Template
from pomona.errors import PomonaError
from pomona.evaluation.answers import greedy_answers
from pomona.evaluation.loss import RowLoss, answer_losses, perplexity
from pomona.evaluation.rouge import rouge_l
from pomona.federation.cohort import FrozenBase
from pomona.federation.graft import measure_gates
from pomona.federation.update import ClientState
from pomona.models.routing import count_routing
from pomona.shapes import TokenMask


@dataclass(frozen=True)
class Evaluation:
    """When and on how much a federation is evaluated.

    Losses every `every` rounds and at the end, on the first `rows` test rows of each client (0: all);
    at the end also ROUGE-L of greedy answers of up to `new_tokens` tokens on the first `answers` rows.
    """

    every: int = 5
    rows: int = 64
    answers: int = 32
    new_tokens: int = 64
    batch: int = 32

    def __post_init__(self) -> None:
        for name in ("every", "new_tokens", "batch"):
            if getattr(self, name) < 1:
                raise PomonaError(
                    f"evaluation {name} {getattr(self, name)} is not positive; use 1 or more"
                )
        for name in ("rows", "answers"):
            if getattr(self, name) < 0:
                raise PomonaError(
                    f"evaluation {name} {getattr(self, name)} is negative; use 0 or more"
                )


def losses_of(
    base: FrozenBase,
    state: ClientState,
    examples: Sequence[Example],
    pad_id: int,
    evaluation: Evaluation,
) -> list[RowLoss]:
    """Return the answer loss of every example under one client's state; empty state: the base."""
    with base.attach_one(state):
        return answer_losses(base.model, examples, pad_id, evaluation.batch)


def loss_summary(losses: Sequence[RowLoss]) -> dict[str, float]:
    """Return nats per answer token over all rows, its perplexity, and what it was measured on."""
    tokens = sum(row.tokens for row in losses)
    loss = sum(row.nats for row in losses) / tokens
    return {"loss": loss, "perplexity": perplexity(loss), "rows": len(losses), "tokens": tokens}


def answers_of(
    base: FrozenBase,
    state: ClientState,
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    max_length: int,
    evaluation: Evaluation,
) -> list[dict[str, Any]]:
    """Return each row's greedy answer, its reference and their ROUGE-L (0..100)."""
    room = max_length - evaluation.new_tokens
    prompts = [encode_prompt(row, template, tokenizer, room) for row in rows]
    with base.attach_one(state):
        answers = greedy_answers(
            base.model, tokenizer, prompts, evaluation.new_tokens, evaluation.batch
        )
    return [
        {
            "rouge_l": rouge_l(answer, row.response),
            "answer": answer,
            "reference": row.response,
        }
        for answer, row in zip(answers, rows, strict=True)
    ]


def routing_of(
    base: FrozenBase,
    state: ClientState,
    examples: Sequence[Example],
    pad_id: int,
    evaluation: Evaluation,
) -> tuple[torch.Tensor, list[float]]:
    """Return tokens per expert [L, E] and the mean gate openness per layer (empty without a graft).

    Layers with fewer experts than the widest are filled with zeros. Padding is not counted.
    """
    total_LE = torch.zeros(
        len(base.sites), max(site.num_experts for site in base.sites), dtype=torch.int64
    )
    openness: list[list[float]] = []
    tokens: list[int] = []
    with base.attach_one(state), torch.no_grad():
        for start in range(0, len(examples), evaluation.batch):
            batch = collate(examples[start : start + evaluation.batch], pad_id)
            mask_BT = batch.attention_mask_BT.bool()
            with count_routing(base.sites, mask_BT=mask_BT) as counts:
                with _gates(base, state, mask_BT) as gates:
                    base.model(
                        input_ids=batch.input_ids_BT,
                        attention_mask=batch.attention_mask_BT,
                        use_cache=False,
                        logits_to_keep=1,
                    )
            total_LE += counts.counts_LCE[:, 0]
            openness.append(gates)
            tokens.append(int(mask_BT.sum()))
    shares = [count / sum(tokens) for count in tokens]
    mean = [
        math.fsum(s * g for s, g in zip(shares, layer, strict=True))
        for layer in zip(*openness, strict=True)
    ]
    return total_LE, mean


def _gates(
    base: FrozenBase, state: ClientState, mask_BT: TokenMask
) -> AbstractContextManager[list[float]]:
    if base.graft is None or not state.graft:
        return nullcontext([])
    return measure_gates(base.sites, base.graft, state.graft, mask_BT.flatten())
