"""What a federation would cost, told without a weight of the model and without a file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil

import torch
from torch import Tensor

from pomona.evaluation.work import matmul_speed
from pomona.federation.clients import ClientRows
from pomona.federation.cohort import FrozenBase
from pomona.federation.estimate import (
    FederationEstimate,
    Memory,
    Traffic,
    active_parameters,
    counted,
)
from pomona.federation.graft import check_count
from pomona.federation.local import LocalTraining
from pomona.federation.outline import OutlinedStep, outlined_step
from pomona.federation.settings import FederateSettings
from pomona.federation.strategies import Corrects, Hears, frozen_part
from pomona.federation.update import ClientState, join, learns, split
from pomona.federation.wire import wire_form
from pomona.models.loading import outline_model
from pomona.models.lora import narrowed
from pomona.models.placement import find_device
from pomona.models.weights import serialized_bytes
from pomona.pipelines.federate.first_adapter import dealt
from pomona.pipelines.federate.prepare import POOLED, frozen_base
from pomona.pipelines.federate.rounds import sent_to_clients, sent_to_newcomers


@dataclass(frozen=True)
class _Messages:
    """What a client begins with, what of it travels every round, what a newcomer is sent, a whole state.

    Stand-ins of the right shapes.
    """

    began: Mapping[str, Tensor]
    down: Mapping[str, Tensor]
    up: Mapping[str, Tensor]
    once: Mapping[str, Tensor]
    state: ClientState


@dataclass(frozen=True)
class _Schedule:
    """What all rounds come to: messages by client, rows and number of all steps, clients in one batch.

    `new` are those who are in no round and train when it is over.
    """

    sent: Mapping[str, int]
    answered: Mapping[str, int]
    new: Sequence[str]
    rows: int
    steps: int
    cohort: int


def preview(
    settings: FederateSettings, rate: float | None = None, device: str = "auto"
) -> FederationEstimate:
    """Return what `federate` would send, keep, compute and hold; nothing is written.

    The clients' rows are read, and of the model its config.json. `rate` is what the machine sustains in
    FLOPs per second, that of `device` in products of the base's dtype if None. Raises `PomonaError` as
    `federate` does.
    """
    where = find_device(device)
    rows = settings.load()
    settings.check_clients(list(rows))
    trainers = _trainers(settings, rows)
    base = frozen_base(_plain(settings), outline_model(settings.model, settings.dtype))
    messages, schedule = _messages(settings, base), _schedule(settings, trainers)
    own = split(messages.state, settings.strategy.shares)[1]
    step = _step(settings, base, messages.state, max(trainers.values()), schedule.cohort)
    cost = counted(base, messages.state, step)
    return FederationEstimate(
        total=sum(p.numel() for p in base.model.parameters()),
        active=active_parameters(base, step),
        clients=len(rows),
        rounds=settings.last_round,
        traffic=_traffic(settings, messages, schedule),
        everything=cost["bytes"],
        shared=_count(messages.down),
        private={
            "adapter": _count(own.adapter),
            "graft": _count(own.graft),
            "personal": _count(own.personal),
        },
        flops=cost["flops_per_token"],
        memory=_memory(settings, base, messages.state, schedule.cohort, step),
        tokens=schedule.rows * settings.max_length + _rehearsed(settings, schedule.steps),
        checkpointing=settings.checkpointing,
        rate=rate or matmul_speed(where, base.model.dtype),
        stated=rate is not None,
    )


def cohort_memory(settings: FederateSettings, rows: int, cohort: int) -> Memory:
    """Return what a step of so many clients, of whom one has `rows` train rows, needs at most."""
    base = frozen_base(_plain(settings), outline_model(settings.model, settings.dtype))
    state = _messages(settings, base).state
    step = _step(settings, base, state, rows, cohort)
    return _memory(settings, base, state, cohort, step)


def _step(
    settings: FederateSettings, base: FrozenBase, state: ClientState, rows: int, cohort: int
) -> OutlinedStep:
    """Outline a step of clients of whom one has so many train rows, with what each of them rehearses."""
    said = settings.rehearsal
    rehearsed = 0 if said is None else ceil(said.rows * said.length / settings.max_length)
    each = min(settings.local.batch, rows) + rehearsed
    learning = _learning(settings, state, cohort)
    return outlined_step(base, learning, cohort * each, settings.max_length)


def _plain(settings: FederateSettings) -> FederateSettings:
    """Return settings of the same shapes: a gate born from a router's row would read its weights.

    Nothing is checkpointed, which has no backward pass to save memory for.
    """
    graft, together = settings.graft, settings.shared_expert
    if graft is not None and graft.gate == "router":
        graft = replace(graft, gate="zero")
    if together is not None and together.gate == "router":
        together = replace(together, gate="zero")
    return replace(settings, graft=graft, shared_expert=together, checkpointing=False)


def _trainers(settings: FederateSettings, rows: Mapping[str, ClientRows]) -> dict[str, int]:
    """Return the number of train rows of everybody who trains."""
    counts = {name: len(own.train) for name, own in rows.items()}
    return {POOLED: sum(counts.values())} if settings.pooled else counts


def _messages(settings: FederateSettings, base: FrozenBase) -> _Messages:
    """Let the strategy begin with zeros that take no memory, and see what it sends."""
    strategy = settings.strategy
    if base.graft is not None:
        check_count(base.sites, base.graft)
    with torch.device("meta"):
        adapter = base.init_adapter(settings.seed)
        first = [list(range(base.graft.count)) for _ in base.sites] if base.graft else []
        graft, personal = base.init_graft(0, "", first), base.init_personal(0, "")
    shared, own = dealt(strategy, _zeros(adapter))
    server = strategy.init(shared)
    state = join(server.shared, replace(own, graft=_zeros(graft), personal=_zeros(personal)))
    up, _ = split(state, strategy.shares, frozen_part(strategy))
    if up and isinstance(strategy, Corrects):
        up |= strategy.report(state.memory, up)[1]
    if up and isinstance(strategy, Hears):
        up["loss"] = torch.zeros(())
    once = sent_to_newcomers(settings, server)
    return _Messages(server.shared, sent_to_clients(strategy, server), up, once, state)


def _zeros(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: torch.zeros((), dtype=v.dtype).expand(v.shape) for n, v in tensors.items()}


def _schedule(settings: FederateSettings, trainers: Mapping[str, int]) -> _Schedule:
    sent, answered = dict.fromkeys(trainers, 0), dict.fromkeys(trainers, 0)
    rows, steps, cohort = 0, 0, 1
    for round_ in range(1, settings.rounds + 1):
        chosen, answering = settings.drawn(trainers, round_)
        cohort = max(cohort, min(len(answering), settings.least_cohort))
        for name in chosen:
            sent[name] += 1
        for name in answering:
            answered[name] += 1
            rows += _rows_of(settings.local, trainers[name])
            steps += settings.local.steps_of(trainers[name])
    finish = settings.finishing
    if finish is not None:
        own = [count for name, count in trainers.items() if settings.finishes(name)]
        rows += finish.rounds * sum(_rows_of(finish.training, count) for count in own)
        steps += finish.rounds * sum(finish.training.steps_of(count) for count in own)
        cohort = max(cohort, min(len(own), settings.least_cohort))
    new = [name for name in trainers if settings.is_new(name) and settings.finishes(name)]
    return _Schedule(sent, answered, new, rows, steps, cohort)


def _rehearsed(settings: FederateSettings, steps: int) -> int:
    """Return the tokens that are rehearsed in so many steps."""
    rehearsal = settings.rehearsal
    return 0 if rehearsal is None else steps * rehearsal.rows * rehearsal.length


def _rows_of(training: LocalTraining, rows: int) -> int:
    """Return the rows of all steps of a round."""
    if training.epochs:
        return training.epochs * rows
    return training.steps_of(rows) * min(training.batch, rows)


def _traffic(settings: FederateSettings, messages: _Messages, schedule: _Schedule) -> Traffic:
    def own(tensors: Mapping[str, Tensor], client: str) -> Mapping[str, Tensor]:
        rank = settings.ranks.get(client)
        return tensors if rank is None else narrowed(tensors, rank)

    def size(tensors: Mapping[str, Tensor], client: str) -> int:
        return _bytes(own(tensors, client))

    def answer(client: str) -> int:
        return _bytes(wire_form(settings, own(messages.began, client), own(messages.up, client)))

    down = {name: size(messages.down, name) for name in schedule.sent}
    up = {name: answer(name) for name in schedule.sent}
    return Traffic(
        max(down.values()),
        max(up.values()),
        sum(down[name] * times for name, times in schedule.sent.items())
        + sum(size(messages.once, name) for name in schedule.new),
        sum(up[name] * times for name, times in schedule.answered.items()),
    )


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return serialized_bytes(tensors) if tensors else 0


def _learning(settings: FederateSettings, state: ClientState, clients: int) -> ClientState:
    """Return a cohort's state on the meta device; indices of experts, which are read, stay."""
    frozen = frozen_part(settings.strategy)

    def leaf(value: Tensor, trained: bool) -> Tensor:
        shape = (clients, *value.shape)
        if not value.is_floating_point():
            return torch.zeros(shape, dtype=value.dtype)
        return torch.empty(shape, dtype=value.dtype, device="meta", requires_grad=trained)

    return ClientState(
        {n: leaf(v, learns(n, frozen)) for n, v in state.adapter.items()},
        {n: leaf(v, True) for n, v in state.graft.items()},
        {n: leaf(v, True) for n, v in state.personal.items()},
    )


def _memory(
    settings: FederateSettings,
    base: FrozenBase,
    state: ClientState,
    clients: int,
    step: OutlinedStep,
) -> Memory:
    learning = _learning(settings, state, clients)
    every = [*learning.adapter.values(), *learning.graft.values(), *learning.personal.values()]
    copies = 4  # value, gradient, two moments
    if settings.local.dp_sgd is not None:
        copies += 2 * settings.local.batch  # every row's own value and gradient
    held = sum(v.nbytes * (copies if v.requires_grad else 1) for v in every)
    weights = sum(p.nbytes for p in base.model.parameters())
    checkpointed = step.waiting_bytes + step.layer_bytes
    return Memory(weights, held, step.kept_bytes, checkpointed, step.layer_bytes // 2)


def _count(tensors: Mapping[str, Tensor]) -> int:
    return sum(v.numel() for v in tensors.values() if v.is_floating_point())
