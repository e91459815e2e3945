"""Federate: sites tune one mixture of experts together, each with a private expert of its own.

FLEx (arXiv 2506.00965): graft once → rounds of {sample → train a cohort → aggregate → evaluate} →
results. The in-process engine: the sampled clients of a cohort train in one batch.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from time import monotonic
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pomona.artifacts.holdings import write_holdings
from pomona.artifacts.inputs import inputs_of
from pomona.artifacts.origin import origin_of, origin_of_graft
from pomona.artifacts.results import assemble_results
from pomona.artifacts.run import RunDirectory, Snapshot
from pomona.data.duplicates import told
from pomona.data.examples import Example, collate, encode, padding_id
from pomona.errors import PomonaError
from pomona.federation.clients import ClientRows
from pomona.federation.cohort import FrozenBase
from pomona.federation.cost import cost_of
from pomona.federation.forgetting import forgetting_lines, held_out_windows
from pomona.federation.graft import Graft, choose_experts
from pomona.federation.holdings import Holdings, holdings_of
from pomona.federation.local import Trained, train_cohort
from pomona.federation.measure import Measured, answers_of, communication, measured_of, speed_of
from pomona.federation.privacy import epsilon, noise_key, protect
from pomona.federation.sampling import participants, survivors
from pomona.federation.settings import FederateSettings, Finish
from pomona.federation.stage import Task
from pomona.federation.strategies import (
    Corrects,
    LocalOnly,
    ServerState,
    SharedFixed,
    Strategy,
    frozen_part,
)
from pomona.federation.update import ClientState, Update, join, split, within
from pomona.models.experts import ExpertSite, expert_sites_if_any, find_expert_sites, freeze
from pomona.models.loading import context_length, load_model, load_tokenizer
from pomona.models.peft_format import read_adapter
from pomona.progress import Progress, Tell, silent, unheard
from pomona.seeds import seed_of
from pomona.shapes import Tokens

POOLED = "everyone"


@dataclass(frozen=True)
class _Federation:
    """What every stage of one run needs."""

    settings: FederateSettings
    run: RunDirectory
    base: FrozenBase
    tokenizer: PreTrainedTokenizerBase
    pad_id: int
    rows: Mapping[str, ClientRows]
    train: Mapping[str, Sequence[Example]]
    test: Mapping[str, Sequence[Example]]
    held_out: Mapping[str, Tokens]
    progress: Progress
    tell: Tell
    holdings: Holdings

    def owner(self, client: str) -> str:
        """Return who trains the model that serves a client."""
        return POOLED if self.settings.pooled else client


def federate(
    settings: FederateSettings,
    run: RunDirectory,
    progress: Progress = silent,
    tell: Tell = unheard,
) -> dict[str, Any]:
    """Run, or go on with, a federation in `run` and return its results (see `artifacts.results`).

    `tell` is told before training which test rows are also trained on. Raises `PomonaError` for
    whatever is wrong with the model, the data or the disk.
    """
    rows = settings.data.load(settings.seed)
    settings.check_clients(list(rows))
    run.claim(inputs_of(settings.model, rows, progress))
    holdings = holdings_of(rows)
    tell(told(holdings.duplicates))
    if run.finished:
        return run.results()
    federation = _prepare(settings, run, rows, progress, tell, holdings)
    write_holdings(run.path, holdings)
    snapshot = run.snapshot() or _begin(federation)
    last = settings.last_round
    for round_ in range(snapshot.round + 1, last + 1):
        progress("rounds", round_ - 1, last)
        step = _round if round_ <= settings.rounds else _finishing_round
        snapshot = step(federation, snapshot, round_)
    progress("rounds", last, last)
    return _finish(federation, snapshot)


def _prepare(
    settings: FederateSettings,
    run: RunDirectory,
    rows: Mapping[str, ClientRows],
    progress: Progress,
    tell: Tell,
    holdings: Holdings,
) -> _Federation:
    tokenizer = load_tokenizer(settings.model)
    model = load_model(settings.model, settings.dtype)
    if settings.max_length > context_length(model):
        raise PomonaError(
            f"max_length {settings.max_length} is longer than the context of {settings.model}, "
            f"{context_length(model)} tokens; make max_length smaller"
        )
    freeze(model)
    sites = _sites(model, settings.graft)
    base = FrozenBase(model, settings.adapter, settings.graft, sites, settings.personal)
    limit = settings.evaluation.rows or None

    def encoded(which: Sequence[Any]) -> list[Example]:
        return [encode(row, settings.template, tokenizer, settings.max_length) for row in which]

    return _Federation(
        settings,
        run,
        base,
        tokenizer,
        padding_id(tokenizer),
        rows,
        _trainers(settings, {name: encoded(client.train) for name, client in rows.items()}),
        {name: encoded(client.test[:limit]) for name, client in rows.items()},
        _held_out(settings, tokenizer),
        progress,
        tell,
        holdings,
    )


def _trainers(
    settings: FederateSettings, train: Mapping[str, Sequence[Example]]
) -> Mapping[str, Sequence[Example]]:
    """Return who trains on what: every client on its own rows, or one on those of all."""
    if not settings.pooled:
        return train
    return {POOLED: [example for own in train.values() for example in own]}


def _held_out(
    settings: FederateSettings, tokenizer: PreTrainedTokenizerBase
) -> Mapping[str, Tokens]:
    """Read the text of forgetting before anything is trained: what is wrong with it shows at once."""
    source, limit = settings.evaluation.forgetting, settings.evaluation.windows
    if source is None:
        return {}
    return held_out_windows(source, tokenizer, settings.max_length, limit)


def _sites(model: Any, graft: Graft | None) -> tuple[ExpertSite, ...]:
    """A graft needs experts to grow from; without one, a dense model federates as well."""
    return tuple(find_expert_sites(model)) if graft is not None else expert_sites_if_any(model)


def _begin(federation: _Federation) -> Snapshot:
    """Choose every client's experts, give birth to its private state, measure the untuned base."""
    settings, base = federation.settings, federation.base
    adapter = _first_adapter(federation)
    own_adapter = split(ClientState(adapter), settings.strategy.shares)[1].adapter
    shared = {name: value for name, value in adapter.items() if name not in own_adapter}
    strategy = settings.strategy
    memory = strategy.birth(shared) if isinstance(strategy, Corrects) else {}
    clients: dict[str, ClientState] = {}
    for done, name in enumerate(federation.train):
        federation.progress("grafting", done, len(federation.train))
        graft = base.init_graft(settings.seed, name, _select(federation, name))
        personal = base.init_personal(settings.seed, name)
        clients[name] = ClientState(own_adapter, graft, personal, memory)
    federation.progress("grafting", len(clients), len(clients))
    metrics = [_loss_line(federation, 0, "base", name, ClientState()) for name in federation.test]
    return federation.run.commit(None, 0, strategy.init(shared), clients, metrics)


def _first_adapter(federation: _Federation) -> dict[str, Tensor]:
    """Return the adapter before the first round: a newborn, or the one of `warm_start`."""
    settings = federation.settings
    newborn = federation.base.init_adapter(settings.seed)
    if settings.warm_start is None:
        return newborn
    lora, tensors = read_adapter(settings.warm_start)
    shapes = {name: value.shape for name, value in tensors.items()}
    if lora.scaling != settings.adapter.scaling or shapes != {
        name: value.shape for name, value in newborn.items()
    }:
        raise PomonaError(
            f"warm_start {settings.warm_start} is no adapter as the recipe has it: it has rank {lora.rank}, "
            f"alpha {lora.alpha:g} and targets {', '.join(lora.targets)}; give the same in [adapter]"
        )
    return {name: tensors[name].float() for name in newborn}


def _select(federation: _Federation, name: str) -> list[list[int]]:
    """Choose from the client's own training rows and nothing else."""
    graft, examples = federation.settings.graft, federation.train[name]
    if graft is None:
        return []
    batches = [collate(examples[i : i + 8], federation.pad_id) for i in range(0, len(examples), 8)]
    seed = seed_of(federation.settings.seed, "selection", name)
    return choose_experts(federation.base.model, federation.base.sites, graft, batches, seed)


def _round(federation: _Federation, snapshot: Snapshot, round_: int) -> Snapshot:
    """Sample → train cohorts → aggregate → evaluate → commit."""
    settings, began = federation.settings, monotonic()
    strategy = settings.strategy
    present = [n for n in federation.train if settings.takes_part(n, round_)]
    chosen = participants(settings.seed, round_, present, settings.fraction)
    answering = survivors(settings.seed, round_, chosen, settings.dropout)
    private: dict[str, ClientState] = {}
    updates: list[Update] = []
    metrics: list[dict[str, Any]] = []
    for name, trained in _train(federation, snapshot, answering, round_):
        shared, private[name] = split(trained.state, strategy.shares, frozen_part(strategy))
        if shared:
            shared |= trained.report
            updates.append(Update(name, len(federation.train[name]), shared))
        metrics.append(_training_line(round_, name, trained))
    protected, spent = _protect(federation, snapshot, updates, round_, len(chosen))
    server = strategy.aggregate(snapshot.server, protected)
    sent = _sent(strategy, snapshot.server)
    metrics += [communication(round_, sent, chosen, updates), *spent]
    return _committed(federation, snapshot, round_, server, private, metrics, began)


def _finishing_round(federation: _Federation, snapshot: Snapshot, round_: int) -> Snapshot:
    """Train what stays at the clients, after the last round and without sending anything."""
    settings, began = federation.settings, monotonic()
    finish = settings.finishing
    assert finish is not None
    strategy = LocalOnly() if finish.adapter else SharedFixed(settings.strategy.shares)
    names = [n for n in federation.train if not finish.newcomers_only or n in settings.newcomers]
    private: dict[str, ClientState] = {}
    metrics: list[dict[str, Any]] = []
    for name, trained in _train(federation, snapshot, names, round_, strategy, finish):
        private[name] = split(trained.state, strategy.shares, frozen_part(strategy))[1]
        metrics.append(_training_line(round_, name, trained))
    return _committed(federation, snapshot, round_, snapshot.server, private, metrics, began)


def _committed(
    federation: _Federation,
    snapshot: Snapshot,
    round_: int,
    server: ServerState,
    private: Mapping[str, ClientState],
    metrics: list[dict[str, Any]],
    began: float,
) -> Snapshot:
    """Evaluate when it is time and make the round final."""
    settings, trained = federation.settings, monotonic() - began
    if round_ % settings.evaluation.every == 0 or round_ == settings.last_round:
        metrics += _evaluate(federation, snapshot, private, server.shared, round_)
    committed = federation.run.commit(snapshot, round_, server, private, metrics)
    federation.run.note_time(
        {"round": round_, "training": trained, "round_seconds": monotonic() - began}
    )
    return committed


def _train(
    federation: _Federation,
    snapshot: Snapshot,
    names: Sequence[str],
    round_: int,
    strategy: Strategy | None = None,
    finish: Finish | None = None,
) -> Iterator[tuple[str, Trained]]:
    """Train some clients, a cohort at a time; after the last round as `finish` says."""
    settings, server = federation.settings, snapshot.server
    training, done, of = settings.local, round_, settings.rounds
    if finish is not None:
        training, done, of = finish.training, round_ - settings.rounds, finish.rounds
    for start in range(0, len(names), settings.cohort):
        tasks = [
            Task(
                name,
                join(server.shared, federation.run.client(snapshot, name)),
                federation.train[name],
                server.memory,
            )
            for name in names[start : start + settings.cohort]
        ]
        trained = train_cohort(
            federation.base,
            tasks,
            training,
            strategy or settings.strategy,
            f"{settings.seed}/finish" if finish else settings.seed,
            done,
            of,
            federation.pad_id,
        )
        yield from zip((task.client for task in tasks), trained, strict=True)


def _training_line(round_: int, name: str, trained: Trained) -> dict[str, Any]:
    return {"round": round_, "model": "training", "client": name, "losses": trained.losses}


def _sent(strategy: Strategy, server: ServerState) -> dict[str, Tensor]:
    """Return what goes to every client: what can have changed since the last round."""
    memory = server.memory if isinstance(strategy, Corrects) else {}
    changed = {n: v for n, v in server.shared.items() if not within(n, frozen_part(strategy))}
    return {**changed, **memory}


def _evaluate(
    federation: _Federation,
    snapshot: Snapshot,
    private: Mapping[str, ClientState],
    shared: Mapping[str, Tensor],
    round_: int,
) -> list[dict[str, Any]]:
    """Measure the shared model and every personal model on each client's test rows."""
    lines: list[dict[str, Any]] = []
    for done, name in enumerate(federation.test):
        federation.progress("evaluating", done, len(federation.test))
        owner = federation.owner(name)
        own = private.get(owner) or federation.run.client(snapshot, owner)
        for kind, state in _models(federation, shared, own).items():
            lines.append(_loss_line(federation, round_, kind, name, state))
    federation.progress("evaluating", len(federation.test), len(federation.test))
    return lines


def _models(
    federation: _Federation, shared: Mapping[str, Tensor], private: ClientState
) -> dict[str, ClientState]:
    """Return the models a client can be served by: the shared one and, if it has one, its own."""
    models: dict[str, ClientState] = {}
    if federation.settings.strategy.shares == "adapter":  # less than that is no model
        models["shared"] = ClientState(shared)
    if private.private:
        models["personal"] = join(shared, private)
    return models


def _loss_line(
    federation: _Federation, round_: int, kind: str, name: str, state: ClientState
) -> dict[str, Any]:
    summary = _measured(federation, name, state).summary()
    if not isfinite(summary["loss"]):
        raise PomonaError(
            f'client "{name}": the loss of the {kind} model is not finite after round {round_}; '
            "lower local.learning_rate, or check the base model"
        )
    return {"round": round_, "model": kind, "client": name, **summary}


def _measured(federation: _Federation, name: str, state: ClientState) -> Measured:
    return measured_of(
        federation.base,
        state,
        federation.test[name],
        federation.pad_id,
        federation.settings.evaluation,
    )


def _protect(
    federation: _Federation,
    snapshot: Snapshot,
    updates: Sequence[Update],
    round_: int,
    sampled: int,
) -> tuple[Sequence[Update], list[dict[str, Any]]]:
    """Return what the server may see of the updates, and the ε that this has cost so far."""
    settings, privacy = federation.settings, federation.settings.privacy
    if privacy is None:
        return updates, []
    key, secret = noise_key(settings.seed)
    spent = epsilon(privacy, round_, len(federation.train), sampled)
    federation.tell(f"round {round_}: ε = {spent:.4g} at δ = {privacy.delta:g}")
    line = {
        "round": round_,
        "model": "privacy",
        "epsilon": spent,
        "delta": privacy.delta,
        "secret": secret,
    }
    return protect(privacy, snapshot.server.shared, updates, key, round_), [line]


def _finish(federation: _Federation, snapshot: Snapshot) -> dict[str, Any]:
    """Evaluate answers, publish what a user keeps, write the results last."""
    run, shared = federation.run, snapshot.server.shared
    answers: list[dict[str, Any]] = []
    routing: list[dict[str, Any]] = []
    private = {name: run.client(snapshot, federation.owner(name)) for name in federation.test}
    for done, (name, own) in enumerate(private.items()):
        federation.progress("answering", done, len(private))
        models = {"base": ClientState(), **_models(federation, shared, own)}
        for kind, state in models.items():
            found = _measured(federation, name, state)
            answers += _answer_lines(federation, name, kind, state, found)
            if federation.base.sites:
                routing.append(_routing_line(name, kind, found))
    _publish(federation, shared, private)
    run.write_answers(answers)
    _write_options(federation, shared, private)
    states = {name: join(shared, own) for name, own in private.items()}
    untuned = [line for line in routing if line["model"] == "base"]
    cost = cost_of(federation.base, states.values(), untuned)
    results = assemble_results(answers, routing, federation.base.sites, private, cost)
    results = run.finish({**results, "data": asdict(federation.holdings)})
    federation.progress("answering", len(private), len(private))
    return results


def _write_options(
    federation: _Federation, shared: Mapping[str, Tensor], private: Mapping[str, ClientState]
) -> None:
    """Measure what is measured on demand: forgetting, speed."""
    base, evaluation = federation.base, federation.settings.evaluation
    if federation.held_out:
        models: list[tuple[str, str | None, ClientState]] = [("base", None, ClientState())]
        for name, own in private.items():
            served = _models(federation, shared, own)
            if "shared" in served and len(models) == 1:
                models.append(("shared", None, served["shared"]))
            if "personal" in served:
                models.append(("personal", name, served["personal"]))
        lines = forgetting_lines(base, models, federation.held_out, evaluation.batch)
        federation.run.write_forgetting(list(lines))
    if evaluation.speed:
        name, own = next(iter(private.items()))
        length = federation.settings.max_length - evaluation.new_tokens
        speed = speed_of(base, join(shared, own), length, evaluation.new_tokens)
        federation.run.write_speed(name, speed)


def _publish(
    federation: _Federation, shared: Mapping[str, Tensor], private: Mapping[str, ClientState]
) -> None:
    """Write what a user keeps, each part with the fingerprint of the base it belongs to."""
    settings, run, base = federation.settings, federation.run, federation.base
    origin = origin_of(base, settings.model, settings.template, settings.max_length)
    if settings.strategy.shares == "adapter":
        run.publish_shared(settings.adapter, shared, origin)
    for name, own in private.items():
        if own.adapter:
            run.publish_adapter(name, settings.adapter, join(shared, own).adapter, origin)
        if settings.personal is not None:
            run.publish_personal(name, settings.personal, own.personal, origin)
        if settings.graft is not None:
            grown = origin_of_graft(origin, base, own.graft)
            run.publish_graft(name, settings.graft, own.graft, grown)


def _answer_lines(
    federation: _Federation, name: str, kind: str, state: ClientState, found: Measured
) -> list[dict[str, Any]]:
    settings, losses = federation.settings, found.losses
    said = answers_of(
        federation.base,
        state,
        federation.rows[name].test[: min(settings.evaluation.answers, len(losses))],
        federation.tokenizer,
        settings.template,
        settings.max_length,
        settings.evaluation,
    )
    unsaid: dict[str, Any] = dict.fromkeys(("rouge_l", "exact_match", "answer", "reference"))
    return [
        {
            "client": name,
            "model": kind,
            "row": row,
            "nats": loss.nats,
            "tokens": loss.tokens,
            **(said[row] if row < len(said) else unsaid),
        }
        for row, loss in enumerate(losses)
    ]


def _routing_line(name: str, kind: str, found: Measured) -> dict[str, Any]:
    return {
        "client": name,
        "model": kind,
        "counts": found.counts_LE.tolist(),
        "tokens": found.tokens,
        "openness": found.openness,
    }
