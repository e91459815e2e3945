"""Nats per token: of answers and of plain text."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch.nn import functional as fn

from pomona.data.examples import Example, collate, pack
from pomona.models.logits import labelled_logits, packed_predictions, text_nats
from pomona.models.packing import packing_of
from pomona.models.placement import device_of
from pomona.shapes import AttentionMask, Tokens

Within = Callable[[AttentionMask], AbstractContextManager[object]]


def _nothing(_mask_BT: AttentionMask) -> AbstractContextManager[object]:
    return nullcontext()


@dataclass(frozen=True)
class RowLoss:
    """The summed negative log-likelihood of a row's answer, or of a window, and its tokens."""

    nats: float
    tokens: int


@torch.no_grad()
def answer_losses(
    model: torch.nn.Module,
    examples: Sequence[Example],
    pad_id: int,
    batch_size: int = 32,
    within: Within = _nothing,
) -> list[RowLoss]:
    """Return every example's answer loss, in the order given.

    Rows of like length share a batch, so that little padding is computed. Each batch's forward pass
    runs inside `within(attention_mask_BT)`, where whoever wants to can watch.
    """
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].input_ids))
    losses: dict[int, RowLoss] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = collate([examples[i] for i in chosen], pad_id).to(device_of(model))
        with within(batch.attention_mask_BT):
            logits_ZV = labelled_logits(
                model, batch.input_ids_BT, batch.attention_mask_BT, batch.label_mask_BT
            )
        nats_Z = fn.cross_entropy(
            logits_ZV.float(), batch.input_ids_BT[batch.label_mask_BT], reduction="none"
        )
        tokens_B = batch.label_mask_BT.sum(1).tolist()
        for i, nats_row in zip(chosen, nats_Z.split(tokens_B), strict=True):
            losses[i] = RowLoss(float(nats_row.double().sum()), len(nats_row))
    return [losses[i] for i in range(len(examples))]


@torch.no_grad()
def packed_answer_losses(
    model: torch.nn.Module, rows: Sequence[Sequence[Example]], batch_size: int = 32
) -> list[list[RowLoss]]:
    """Return the answer loss of every client's rows, of all clients' in passes of up to `batch_size` rows.

    Rows are client-major and packed: what is hooked on for a cohort gives each client's its own parameters.
    The model must be ready for packed passes (`models.packing.can_pack`). The twin is `answer_losses`.
    """
    orders = [sorted(range(len(own)), key=lambda i: len(own[i].input_ids)) for own in rows]
    each, device = max(1, batch_size // len(rows)), device_of(model)
    losses: list[dict[int, RowLoss]] = [{} for _ in rows]
    for start in range(0, max(map(len, orders)), each):
        chosen = [order[start : start + each] for order in orders]
        packed = pack([[own[i] for i in some] for own, some in zip(rows, chosen, strict=True)]).to(
            device
        )
        answer_A = packed.label_N.nonzero().squeeze(1)
        packing = packing_of(packed.lengths, device)
        nats_A, _ = packed_predictions(model, packed.input_ids_N, answer_A, answer_A[:0], packing)
        flat = [(c, i) for c, some in enumerate(chosen) for i in some]
        tokens = [rows[c][i].answer_tokens for c, i in flat]
        for (c, i), nats_row in zip(flat, nats_A.split(tokens), strict=True):
            losses[c][i] = RowLoss(float(nats_row.double().sum()), len(nats_row))
    return [[own[i] for i in range(len(own))] for own in losses]


def text_loss(model: torch.nn.Module, windows_BT: Tokens, batch_size: int = 16) -> float:
    """Return the mean nats per predicted token of plain text windows."""
    losses = window_losses(model, windows_BT, batch_size)
    return sum(window.nats for window in losses) / sum(window.tokens for window in losses)


@torch.no_grad()
def window_losses(
    model: torch.nn.Module, windows_BT: Tokens, batch_size: int = 16
) -> list[RowLoss]:
    """Return every window's loss over its predicted tokens: all but the first."""
    losses: list[RowLoss] = []
    for short_BT in windows_BT.to(device_of(model)).split(batch_size):
        nats_BT = text_nats(model, short_BT.long())
        losses += [RowLoss(float(nats_T.double().sum()), len(nats_T)) for nats_T in nats_BT]
    return losses


def perplexity(nats: float) -> float:
    """Return exp(nats per token); infinite where no float holds it."""
    return math.exp(nats) if nats < 709 else math.inf
