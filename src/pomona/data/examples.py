"""Rows as tokens: an example knows where its answer begins, a batch which tokens are answers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias, cast

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pomona.data.row import Row
from pomona.data.templates import Template
from pomona.shapes import AttentionMask, TokenMask, Tokens

Texts: TypeAlias = Sequence[tuple[str, str]]
"""Prompts and answers."""


@dataclass(frozen=True)
class Example:
    """A prompt with its answer; tokens from `prompt_length` on are the answer and its end."""

    input_ids: tuple[int, ...] = field(repr=False)
    prompt_length: int

    @property
    def answer_tokens(self) -> int:
        """How many tokens are labels; the first of a row, which nothing predicts, is none."""
        return len(self.input_ids) - max(self.prompt_length, 1)


@dataclass(frozen=True)
class Batch:
    """Right-padded examples [B, T]; labels are answer tokens, of which none is the first of its row."""

    input_ids_BT: Tokens
    attention_mask_BT: AttentionMask
    label_mask_BT: TokenMask

    def to(self, device: torch.device) -> "Batch":
        """Return the same batch on a device."""
        ids_BT, mask_BT, label_BT = self.input_ids_BT, self.attention_mask_BT, self.label_mask_BT
        return Batch(ids_BT.to(device), mask_BT.to(device), label_BT.to(device))


def encode(
    row: Row, template: Template, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Example:
    """Return a row's tokens, at most `max_length`.

    Too long an answer is cut to half of `max_length`, and a prompt to what is left, from its left:
    its end, where the answer is asked for, stays.
    """
    return examples_of(texts_of([row], template, tokenizer), tokenizer, max_length)[0]


def texts_of(rows: Sequence[Row], template: Template, tokenizer: PreTrainedTokenizerBase) -> Texts:
    """Return every row's prompt and answer as text."""
    return [(template.prompt(row, tokenizer), row.response.strip()) for row in rows]


def examples_of(texts: Texts, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Example]:
    """Return the examples of prompts and answers, at most `max_length` tokens each.

    Both are encoded apart, so that the prompt's tokens never depend on the answer.
    """
    if not texts:
        return []
    prompts, answers = (_tokens(list(part), tokenizer) for part in zip(*texts, strict=True))
    return [
        _cut(_begun(prompt, tokenizer), _ended(answer, tokenizer), max_length)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def _begun(prompt: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    begin = tokenizer.bos_token_id
    return prompt if begin is None or prompt[:1] == [begin] else [cast(int, begin), *prompt]


def _ended(answer: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    end = tokenizer.eos_token_id
    return answer if end is None else [*answer, cast(int, end)]


def _cut(prompt: list[int], answer: list[int], max_length: int) -> Example:
    if len(prompt) + len(answer) > max_length:
        answer = answer[: max(max_length // 2, max_length - len(prompt))]
    kept = _keep_end(prompt, max_length - len(answer))
    return Example((*kept, *answer), len(kept))


def encode_prompt(
    row: Row, template: Template, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[int]:
    """Return the tokens after which a model is to answer: the same that `encode` begins with."""
    (prompt,) = _tokens([template.prompt(row, tokenizer)], tokenizer)
    return _keep_end(_begun(prompt, tokenizer), max_length)


def collate(examples: Sequence[Example], pad_id: int) -> Batch:
    """Return a right-padded batch."""
    length = max(len(example.input_ids) for example in examples)
    input_ids_BT = torch.full((len(examples), length), pad_id, dtype=torch.int64)
    size_B = torch.tensor([len(example.input_ids) for example in examples])
    start_B = torch.tensor([max(example.prompt_length, 1) for example in examples])
    for row, example in enumerate(examples):
        input_ids_BT[row, : len(example.input_ids)] = torch.tensor(example.input_ids)
    place_T = torch.arange(length)
    real_BT = place_T < size_B.unsqueeze(1)
    return Batch(input_ids_BT, real_BT.long(), real_BT & (place_T >= start_B.unsqueeze(1)))


@dataclass(frozen=True)
class PackedRows:
    """Clients' rows one after another [N], without padding; `lengths` are those of each client's rows."""

    input_ids_N: Int[Tensor, " N"]
    label_N: Bool[Tensor, " N"]
    lengths: tuple[tuple[int, ...], ...]

    def to(self, device: torch.device) -> "PackedRows":
        """Return the same rows on a device."""
        return PackedRows(self.input_ids_N.to(device), self.label_N.to(device), self.lengths)


def pack(rows: Sequence[Sequence[Example]]) -> PackedRows:
    """Return clients' rows packed; labels are answer tokens, of which none is the first of its row."""
    flat = [example for own in rows for example in own]
    ids_N = torch.tensor([token for example in flat for token in example.input_ids])
    label_N = torch.cat([torch.arange(len(e.input_ids)) >= max(e.prompt_length, 1) for e in flat])
    return PackedRows(ids_N, label_N, tuple(tuple(len(e.input_ids) for e in own) for own in rows))


def collate_prompts(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Tokens, AttentionMask]:
    """Return left-padded prompts and their attention mask, for generation."""
    length = max(map(len, prompts))
    input_ids_BT = torch.full((len(prompts), length), pad_id, dtype=torch.int64)
    mask_BT = torch.zeros_like(input_ids_BT)
    for row, prompt in enumerate(prompts):
        input_ids_BT[row, length - len(prompt) :] = torch.tensor(prompt)
        mask_BT[row, length - len(prompt) :] = 1
    return input_ids_BT, mask_BT


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the padding token, else the end-of-sequence token, else 0: masked, it is never seen."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return cast(int, next(token for token in known if token is not None))


def _tokens(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]  # pyright: ignore


def _keep_end(tokens: list[int], length: int) -> list[int]:
    """Keep the first token (it may be the beginning-of-sequence token) and the last ones."""
    return tokens if len(tokens) <= length else [tokens[0], *tokens[len(tokens) - length + 1 :]]
