"""Federate: sites tune one mixture of experts together, each with a private expert of its own.

FLEx (arXiv 2506.00965): graft once → rounds of {sample → train a cohort → aggregate → evaluate} →
results. The in-process engine: the sampled clients of a cohort train in one batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from time import monotonic
from typing import Any, Literal

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pomona.artifacts.inputs import inputs_of
from pomona.artifacts.origin import origin_of, origin_of_graft
from pomona.artifacts.results import assemble_results
from pomona.artifacts.run import RunDirectory, Snapshot
from pomona.data.examples import Example, collate, encode, padding_id
from pomona.data.templates import Alpaca, Template
from pomona.errors import PomonaError
from pomona.federation.clients import ClientData, ClientRows
from pomona.federation.cohort import FrozenBase
from pomona.federation.cost import cost_of
from pomona.federation.forgetting import forgetting_lines, held_out_windows
from pomona.federation.graft import Graft
from pomona.federation.local import LocalTraining, Task, train_cohort
from pomona.federation.measure import (
    Evaluation,
    Measured,
    answers_of,
    communication,
    measured_of,
    speed_of,
)
from pomona.federation.sampling import participants
from pomona.federation.strategies import FedAvg, Strategy
from pomona.federation.update import ClientState, Update, join, split
from pomona.models.experts import ExpertSite, expert_sites_if_any, find_expert_sites, freeze
from pomona.models.loading import context_length, load_model, load_tokenizer
from pomona.models.lora import LoRA
from pomona.progress import Progress, silent
from pomona.seeds import seed_of
from pomona.shapes import Tokens


@dataclass(frozen=True)
class FederateSettings:
    """A federation, whole: what a recipe says and `federate` does."""

    model: str = field(metadata={"path": True})
    data: ClientData
    name: str = "federation"
    seed: int = 0
    rounds: int = 20
    fraction: float = 1.0
    cohort: int = 16
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    template: Template = field(default_factory=Alpaca)
    max_length: int = 512
    adapter: LoRA = field(default_factory=LoRA)
    graft: Graft | None = None
    strategy: Strategy = field(default_factory=FedAvg)
    local: LocalTraining = field(default_factory=LocalTraining)
    evaluation: Evaluation = field(default_factory=Evaluation)

    def __post_init__(self) -> None:
        for name in ("rounds", "cohort", "max_length"):
            if getattr(self, name) < 1:
                raise PomonaError(f"{name} {getattr(self, name)} is not positive; use 1 or more")
        if not 0 < self.fraction <= 1:
            raise PomonaError(f"fraction {self.fraction} is not between 0 and 1")
        if self.evaluation.new_tokens >= self.max_length:
            raise PomonaError(
                f"evaluation new_tokens {self.evaluation.new_tokens} leave no room for a prompt in "
                f"max_length {self.max_length}; make one smaller or the other larger"
            )


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


def federate(
    settings: FederateSettings, run: RunDirectory, progress: Progress = silent
) -> dict[str, Any]:
    """Run, or go on with, a federation in `run` and return its results (see `artifacts.results`).

    Raises `PomonaError` for whatever is wrong with the model, the data or the disk.
    """
    rows = settings.data.load(settings.seed)
    run.claim(inputs_of(settings.model, rows, progress))
    if run.finished:
        return run.results()
    federation = _prepare(settings, run, rows, progress)
    snapshot = run.snapshot() or _begin(federation)
    for round_ in range(snapshot.round + 1, settings.rounds + 1):
        progress("rounds", round_ - 1, settings.rounds)
        snapshot = _round(federation, snapshot, round_)
    progress("rounds", settings.rounds, settings.rounds)
    return _finish(federation, snapshot)


def _prepare(
    settings: FederateSettings,
    run: RunDirectory,
    rows: Mapping[str, ClientRows],
    progress: Progress,
) -> _Federation:
    tokenizer = load_tokenizer(settings.model)
    model = load_model(settings.model, settings.dtype)
    if settings.max_length > context_length(model):
        raise PomonaError(
            f"max_length {settings.max_length} is longer than the context of {settings.model}, "
            f"{context_length(model)} tokens; make max_length smaller"
        )
    freeze(model)
    base = FrozenBase(model, settings.adapter, settings.graft, _sites(model, settings.graft))
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
        {name: encoded(client.train) for name, client in rows.items()},
        {name: encoded(client.test[:limit]) for name, client in rows.items()},
        _held_out(settings, tokenizer),
        progress,
    )


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
    adapter = base.init_adapter(settings.seed)
    shared, own_adapter = split(ClientState(adapter), settings.strategy.shares)
    clients: dict[str, ClientState] = {}
    for done, name in enumerate(federation.train):
        federation.progress("grafting", done, len(federation.train))
        graft = base.init_graft(settings.seed, name, _select(federation, name))
        clients[name] = ClientState(own_adapter.adapter, graft)
    federation.progress("grafting", len(clients), len(clients))
    metrics = [_loss_line(federation, 0, "base", name, ClientState()) for name in federation.train]
    return federation.run.commit(None, 0, settings.strategy.init(shared), clients, metrics)


def _select(federation: _Federation, name: str) -> list[int]:
    """Choose from the client's own training rows and nothing else."""
    graft, examples = federation.settings.graft, federation.train[name]
    if graft is None:
        return []
    batches = [collate(examples[i : i + 8], federation.pad_id) for i in range(0, len(examples), 8)]
    seed = seed_of(federation.settings.seed, "selection", name)
    return graft.selection(federation.base.model, federation.base.sites, batches, seed)


def _round(federation: _Federation, snapshot: Snapshot, round_: int) -> Snapshot:
    """Sample → train cohorts → aggregate → evaluate → commit."""
    settings, began = federation.settings, monotonic()
    chosen = participants(settings.seed, round_, list(federation.train), settings.fraction)
    private: dict[str, ClientState] = {}
    updates: list[Update] = []
    metrics: list[dict[str, Any]] = []
    for start in range(0, len(chosen), settings.cohort):
        names = chosen[start : start + settings.cohort]
        for name, state, losses in _train(federation, snapshot, names, round_):
            shared, private[name] = split(state, settings.strategy.shares)
            if shared:
                updates.append(Update(name, len(federation.train[name]), shared))
            metrics.append({"round": round_, "model": "training", "client": name, "losses": losses})
    server = settings.strategy.aggregate(snapshot.server, updates)
    metrics.append(communication(round_, snapshot.server.shared, chosen, updates))
    trained = monotonic() - began
    if round_ % settings.evaluation.every == 0 or round_ == settings.rounds:
        metrics += _evaluate(federation, snapshot, private, server.shared, round_)
    committed = federation.run.commit(snapshot, round_, server, private, metrics)
    federation.run.note_time(
        {"round": round_, "training": trained, "round_seconds": monotonic() - began}
    )
    return committed


def _train(
    federation: _Federation, snapshot: Snapshot, names: Sequence[str], round_: int
) -> list[tuple[str, ClientState, list[float]]]:
    settings = federation.settings
    tasks = [
        Task(
            name,
            join(snapshot.server.shared, federation.run.client(snapshot, name)),
            federation.train[name],
        )
        for name in names
    ]
    states, losses = train_cohort(
        federation.base,
        tasks,
        settings.local,
        settings.strategy,
        settings.seed,
        round_,
        settings.rounds,
        federation.pad_id,
    )
    return list(zip(names, states, losses.tolist(), strict=True))


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
        own = private.get(name) or federation.run.client(snapshot, name)
        for kind, state in _models(shared, own).items():
            lines.append(_loss_line(federation, round_, kind, name, state))
    federation.progress("evaluating", len(federation.test), len(federation.test))
    return lines


def _models(shared: Mapping[str, Tensor], private: ClientState) -> dict[str, ClientState]:
    """Return the models a client can be served by: the shared one and, if it has one, its own."""
    models: dict[str, ClientState] = {}
    if shared:
        models["shared"] = ClientState(shared)
    if private.adapter or private.graft:
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


def _finish(federation: _Federation, snapshot: Snapshot) -> dict[str, Any]:
    """Evaluate answers, publish what a user keeps, write the results last."""
    run, shared = federation.run, snapshot.server.shared
    answers: list[dict[str, Any]] = []
    routing: list[dict[str, Any]] = []
    private = {name: run.client(snapshot, name) for name in federation.test}
    for done, (name, own) in enumerate(private.items()):
        federation.progress("answering", done, len(private))
        for kind, state in {"base": ClientState(), **_models(shared, own)}.items():
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
    results = run.finish(assemble_results(answers, routing, federation.base.sites, private, cost))
    federation.progress("answering", len(private), len(private))
    return results


def _write_options(
    federation: _Federation, shared: Mapping[str, Tensor], private: Mapping[str, ClientState]
) -> None:
    """Measure what is measured on demand: forgetting, speed."""
    base, evaluation = federation.base, federation.settings.evaluation
    if federation.held_out:
        models = [("base", None, ClientState())]
        models += [("shared", None, ClientState(shared))] if shared else []
        for name, own in private.items():
            models += [(k, name, s) for k, s in _models(shared, own).items() if k == "personal"]
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
    if shared:
        run.publish_shared(settings.adapter, shared, origin)
    for name, own in private.items():
        if own.adapter:
            run.publish_adapter(name, settings.adapter, own.adapter, origin)
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
