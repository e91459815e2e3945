"""What a cohort's step costs each client: answers, the balance of the router, what is rehearsed."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from pomona.data.examples import Batch, Example, collate, pack
from pomona.federation.cohort import FrozenBase
from pomona.models.logits import packed_predictions
from pomona.models.packing import Packing, packing_of
from pomona.models.routing import Routed, routed_by
from pomona.models.split import Even, Split
from pomona.shapes import PerClient
from pomona.training.loss import balance_losses, client_means, completion_losses


@dataclass(frozen=True)
class PackedStep:
    """The rows and texts of a step, packed in memory.

    answer_A and text_T are the places of the tokens whose successor is to be predicted in rows and in texts,
    text_N tells the tokens of texts, `texts` are each client's.
    """

    input_ids_N: Int[Tensor, " N"] = field(repr=False)
    packing: Packing = field(repr=False)
    answer_A: Int[Tensor, " A"] = field(repr=False)
    text_T: Int[Tensor, " T"] = field(repr=False)
    text_N: Bool[Tensor, " N"] = field(repr=False)
    texts: Sequence[Sequence[int]]

    def losses(self, base: FrozenBase, router_loss: float) -> PerClient:
        """Return what `client_losses` does, of all rows and texts in one pass of real tokens only."""
        device = base.device
        packing, text_N = self.packing.to(device), self.text_N.to(device)
        answer_A, text_T = self.answer_A.to(device), self.text_T.to(device)
        split = packing.split
        with routed_by(base.sites if router_loss else ()) as routed:
            nats_A, texts_TV = packed_predictions(
                base.model, self.input_ids_N.to(device), answer_A, text_T, packing
            )
        loss_C = client_means(nats_A, split.client_N[answer_A], len(split.sizes))
        loss_C = _balanced(loss_C, routed, ~text_N, split, router_loss)
        if base.rehearsed is None or not self.texts:
            return loss_C
        logits_XPV = texts_TV.unflatten(0, (sum(map(len, self.texts)), -1))
        return _in_gradient(loss_C, base.rehearsed.losses_of(logits_XPV, self.texts))


@dataclass(frozen=True)
class PaddedStep:
    """The rows of a step, padded to the longest in memory; `real_B` are no fillers."""

    batch: Batch = field(repr=False)
    real_B: Bool[Tensor, " B"] = field(repr=False)
    clients: int
    texts: Sequence[Sequence[int]]

    def losses(self, base: FrozenBase, router_loss: float) -> PerClient:
        """Return what `client_losses` does; the texts are a pass of their own."""
        batch, real_B = self.batch.to(base.device), self.real_B.to(base.device)
        with routed_by(base.sites if router_loss else ()) as routed:
            loss_C = completion_losses(
                base.model,
                batch.input_ids_BT,
                batch.attention_mask_BT,
                batch.label_mask_BT,
                self.clients,
            )
        counted_N = (batch.attention_mask_BT.bool() & real_B.unsqueeze(1)).flatten()
        split = Even(len(counted_N), self.clients, base.device)
        loss_C = _balanced(loss_C, routed, counted_N, split, router_loss)
        if base.rehearsed is None or not self.texts:
            return loss_C
        return _in_gradient(loss_C, base.rehearsed.losses(base.model, self.texts))


def client_losses(
    base: FrozenBase,
    rows: Sequence[Sequence[Example]],
    clients: int,
    pad_id: int,
    router_loss: float = 0.0,
    texts: Sequence[Sequence[int]] = (),
) -> PerClient:
    """Return each client's nats per answer token [C] on its rows of a step.

    `rows` are shared out among `clients` in their order: all who have rows, or every row a client of its own.
    `router_loss` times the load-balancing loss is in the gradient, and so is what is rehearsed of each client's
    `texts`; neither is in the loss that is told.
    """
    return prepared(base, rows, clients, pad_id, texts).losses(base, router_loss)


def prepared(
    base: FrozenBase,
    rows: Sequence[Sequence[Example]],
    clients: int,
    pad_id: int,
    texts: Sequence[Sequence[int]] = (),
) -> PackedStep | PaddedStep:
    """Return all that a step computes with, in memory; see `client_losses`."""
    if not base.packs:
        batch, real_B = _fill(rows, pad_id)
        return PaddedStep(batch, real_B, clients, texts)
    own, said = _shared_out(rows, clients), base.rehearsed if texts else None
    more = [said.examples(each) for each in texts] if said else [[] for _ in own]
    packed = pack([[*rows, *texts] for rows, texts in zip(own, more, strict=True)])
    text_N = _of_texts(list(map(len, own)), packed.lengths)
    answer_A, text_T = (
        (packed.label_N & which).nonzero().squeeze(1) for which in (~text_N, text_N)
    )
    packing = packing_of(packed.lengths, torch.device("cpu"))
    return PackedStep(packed.input_ids_N, packing, answer_A, text_T, text_N, texts)


def _shared_out(rows: Sequence[Sequence[Example]], clients: int) -> list[list[Example]]:
    """Return every client's rows; where each row is a client, those that are missing have none."""
    if clients == len(rows):
        return [list(own) for own in rows]
    size = clients // len(rows)
    return [list(own[k : k + 1]) for own in rows for k in range(size)]


def _of_texts(rows: Sequence[int], lengths: Sequence[Sequence[int]]) -> Bool[Tensor, " N"]:
    """Tell the tokens of texts, which follow each client's so many rows."""
    texts = [k >= count for count, own in zip(rows, lengths, strict=True) for k in range(len(own))]
    flat = [length for own in lengths for length in own]
    return torch.tensor(texts).repeat_interleave(torch.tensor(flat))


def _balanced(
    loss_C: PerClient,
    routed: Sequence[Routed],
    counted_N: Bool[Tensor, " N"],
    split: Split,
    router_loss: float,
) -> PerClient:
    if not routed:
        return loss_C
    return _in_gradient(loss_C, router_loss * balance_losses(routed, counted_N, split))


def _in_gradient(loss_C: PerClient, more_C: PerClient) -> PerClient:
    """Return losses of the same value whose gradient has that of `more_C` too."""
    return loss_C + (more_C - more_C.detach())


def _fill(rows: Sequence[Sequence[Example]], pad_id: int) -> tuple[Batch, Bool[Tensor, " B"]]:
    """Collate client-major and tell the real rows; one added for alignment repeats one without its label."""
    size = max(map(len, rows))
    filled = [row for own in rows for row in [*own, *[own[0]] * (size - len(own))]]
    batch = collate(filled, pad_id)
    real_B = torch.tensor([k < len(own) for own in rows for k in range(size)])
    labels_BT = batch.label_mask_BT & real_B.unsqueeze(1)
    return Batch(batch.input_ids_BT, batch.attention_mask_BT, labels_BT), real_B
