"""What is measured of clients' models, many at once: answer loss, answers, routing, gates."""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pomona.data.examples import Example, encode_prompt
from pomona.data.rows import Row
from pomona.data.templates import Template
from pomona.evaluation.answers import cohort_answers
from pomona.evaluation.exact import exact_match
from pomona.evaluation.loss import RowLoss, answer_losses, packed_answer_losses, perplexity
from pomona.evaluation.rouge import rouge_l
from pomona.evaluation.speed import Speed, generation_speeds
from pomona.federation.cohort import FrozenBase
from pomona.federation.evaluation import Evaluation
from pomona.federation.gates import GateWeights, measure_gates
from pomona.federation.update import ClientState, stack
from pomona.models.packing import follow
from pomona.models.routing import count_routing
from pomona.models.split import Present
from pomona.models.weights import serialized_bytes
from pomona.shapes import AttentionMask


@dataclass(frozen=True)
class Measured:
    """One model on one client's test rows.

    counts_LE: assignments per expert [L, E] of the rows' `tokens`, padding left out; layers with fewer
    experts than the widest are filled with zeros. openness: the mean gate σ per layer, empty without a
    graft.
    """

    losses: list[RowLoss]
    counts_LE: Int[Tensor, "L E"]
    openness: list[float]
    tokens: int

    def summary(self) -> dict[str, Any]:
        """Return the loss in nats per token and what it was measured on, routing and gates if any."""
        found: dict[str, Any] = loss_summary(self.losses)
        if len(self.counts_LE):
            found["counts"] = self.counts_LE.tolist()
        if self.openness:
            found["openness"] = self.openness
        return found


@dataclass(frozen=True)
class Models:
    """A kind of model ("base", "shared", "personal") of some clients: each its own, or one that serves all.

    The states are as many as the clients, or a single one. Without clients it is nobody's in particular.
    """

    kind: str
    clients: Sequence[str]
    states: Sequence[ClientState] = field(repr=False)

    def part(self, places: Sequence[int]) -> "Models":
        """Return the models of the clients at some places."""
        clients = [self.clients[place] for place in places]
        states = self.states if len(self.states) == 1 else [self.states[place] for place in places]
        return Models(self.kind, clients, states)

    def each(self) -> Iterator[tuple[str | None, ClientState]]:
        """Yield every client with its model; None with one that is nobody's in particular."""
        for place, client in enumerate(self.clients or [None]):
            yield client, self.states[min(place, len(self.states) - 1)]


def losses_of(
    base: FrozenBase,
    states: Sequence[ClientState],
    rows: Sequence[Sequence[Example]],
    pad_id: int,
    batch: int,
) -> list[list[RowLoss]]:
    """Return the answer loss of every client's rows, `batch` of them in a pass.

    The states are the clients' own, or a single one that serves all; an empty one is the base.
    """
    if base.packs:
        with base.attach(_together(states)):
            return packed_answer_losses(base.model, rows, batch)
    losses: list[list[RowLoss]] = []
    for state, own in zip(_each(states, rows), rows, strict=True):
        with base.attach(_together([state])):
            losses.append(answer_losses(base.model, own, pad_id, batch))
    return losses


def loss_summary(losses: Sequence[RowLoss]) -> dict[str, float]:
    """Return nats per answer token over all rows, its perplexity, and what it was measured on."""
    tokens = sum(row.tokens for row in losses)
    loss = sum(row.nats for row in losses) / tokens
    return {"loss": loss, "perplexity": perplexity(loss), "rows": len(losses), "tokens": tokens}


def answers_of(
    base: FrozenBase,
    states: Sequence[ClientState],
    rows: Sequence[Sequence[Row]],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    max_length: int,
    evaluation: Evaluation,
) -> list[list[dict[str, Any]]]:
    """Return the greedy answer to every row of each client, its reference, ROUGE-L and exact match (0..100).

    The states are the clients' own, each with at least one row, and all of them decode together; or a single
    one that answers for all.
    """
    room = max_length - evaluation.new_tokens
    asked = [[encode_prompt(row, template, tokenizer, room) for row in own] for own in rows]
    prompts = asked if len(states) > 1 else [[prompt for own in asked for prompt in own]]
    with base.attach(_together(states)):
        found = cohort_answers(
            base.model, tokenizer, prompts, evaluation.new_tokens, evaluation.batch
        )
    answers = (answer for own in found for answer in own)
    return [[_scored(next(answers), row) for row in own] for own in rows]


def _scored(answer: str, row: Row) -> dict[str, Any]:
    return {
        "rouge_l": rouge_l(answer, row.response),
        "exact_match": exact_match(answer, row.response),
        "answer": answer,
        "reference": row.response,
    }


def measured_of(
    base: FrozenBase,
    states: Sequence[ClientState],
    rows: Sequence[Sequence[Example]],
    pad_id: int,
    batch: int,
) -> list[Measured]:
    """Measure every client's answer losses and, in the same passes, routing and gates; see `losses_of`."""
    if base.packs:
        return _packed_measured(base, _together(states), rows, batch)
    return [
        _padded_measured(base, state, own, pad_id, batch)
        for state, own in zip(_each(states, rows), rows, strict=True)
    ]


def _packed_measured(
    base: FrozenBase, state: ClientState, rows: Sequence[Sequence[Example]], batch: int
) -> list[Measured]:
    """Measure all clients' rows in common passes, under a cohort's state or a single one."""
    clients, present = len(rows), Present()
    state = state.to(base.device)
    with (
        base.attach(state),
        follow(base.model, present),
        count_routing(base.sites, clients, present=present) as counts,
        _gates(base, state, clients, present=present) as gates,
    ):
        losses = packed_answer_losses(base.model, rows, batch)
    tokens = [sum(len(example.input_ids) for example in own) for own in rows]
    return [
        Measured(losses[c], counts.counts_LCE[:, c], gates.mean_LC[:, c].tolist(), tokens[c])
        for c in range(clients)
    ]


def _padded_measured(
    base: FrozenBase, state: ClientState, rows: Sequence[Example], pad_id: int, batch: int
) -> Measured:
    """Measure one client's rows padded side by side: the twin of `_packed_measured`."""
    stacked = _together([state]).to(base.device)
    tokens = 0

    @contextmanager
    def watch(mask_BT: AttentionMask) -> Generator[None]:
        nonlocal counts_LE, sums_L, tokens
        with (
            count_routing(base.sites, mask_BT=mask_BT) as counts,
            _gates(base, stacked, mask_BT=mask_BT) as gates,
        ):
            yield
        counts_LE = counts_LE + counts.counts_LCE[:, 0]
        sums_L = sums_L + gates.sum_LC[:, 0]
        tokens += int(mask_BT.sum())

    counts_LE = torch.zeros((), dtype=torch.int64)
    sums_L = torch.zeros((), dtype=torch.float64)
    with base.attach(stacked):
        losses = answer_losses(base.model, rows, pad_id, batch, watch)
    return Measured(losses, counts_LE, (sums_L / tokens).tolist(), tokens)


def _together(states: Sequence[ClientState]) -> ClientState:
    """Return a cohort's state to compute with: what clients remember may differ, and is not looked at."""
    return stack([replace(state, memory={}) for state in states])


def _each(
    states: Sequence[ClientState], rows: Sequence[Sequence[Example]]
) -> Sequence[ClientState]:
    return states if len(states) > 1 else [states[0]] * len(rows)


def speed_of(
    base: FrozenBase, state: ClientState, prompt: int, new_tokens: int, repeats: int = 5
) -> dict[str, Speed]:
    """Time greedy generation of the base and of one client's model, side by side, in turn."""
    vocabulary = base.model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    prompt_BT = torch.randint(vocabulary, (1, prompt), generator=generator)
    models = {"base": base.model, "client": base.model}
    worn = {"client": lambda: base.attach_one(state)}
    return generation_speeds(models, prompt_BT.to(base.device), new_tokens, repeats, worn=worn)


def communication(
    round_: int, sent: Mapping[str, int], received: Mapping[str, int]
) -> dict[str, Any]:
    """Return the line of a round's messages: bytes to and from every client, and of all together.

    They are measured as they are serialised (`message_bytes`); nothing to send is no message.
    """
    return {
        "round": round_,
        "model": "communication",
        "sent_bytes": sum(sent.values()),
        "received_bytes": sum(received.values()),
        "sent": dict(sent),
        "received": {name: received.get(name, 0) for name in sent},
    }


def message_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Return the length of tensors as safetensors, header included, which names, types and shapes decide."""
    return serialized_bytes(tensors) if tensors else 0


def _gates(
    base: FrozenBase,
    state: ClientState,
    clients: int = 1,
    mask_BT: AttentionMask | None = None,
    present: Present | None = None,
) -> AbstractContextManager[GateWeights]:
    if base.graft is None or not state.graft:
        none_LC = torch.zeros(0, clients, dtype=torch.float64)
        return nullcontext(GateWeights(none_LC, none_LC))
    return measure_gates(base.sites, base.graft, state.graft, clients, mask_BT, present)
