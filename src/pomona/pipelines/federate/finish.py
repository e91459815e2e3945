"""What is left when the rounds are over: answers, routing, cost, and the folders that a user keeps."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor

from pomona.artifacts.checkpoint import Snapshot
from pomona.artifacts.origin import origin_of
from pomona.artifacts.publish import publish_client, publish_shared
from pomona.artifacts.results import assemble_results
from pomona.federation.cohort import FrozenBase
from pomona.federation.cost import cost_of
from pomona.federation.forgetting import forgetting_lines, task_lines
from pomona.federation.measure import Measured, Models, answers_of, speed_of
from pomona.federation.update import ClientState
from pomona.pipelines.federate.evaluate import loss_line, measured, models_of, side_by_side
from pomona.pipelines.federate.prepare import Federation


def finish(federation: Federation, snapshot: Snapshot) -> dict[str, Any]:
    """Evaluate answers, publish what a user keeps, write the results last."""
    run, shared = federation.run, snapshot.server.shared
    private = _Private(federation, snapshot)
    last = _last_look(federation, snapshot)
    _publish(federation, shared, private)
    run.add_metrics(last.metrics)
    run.write_answers(last.answers)
    _write_options(federation, snapshot)
    states = (federation.state(n, shared, own) for n, own in private.items())
    untuned = [line for line in last.routing if line["model"] == "base"]
    cost = cost_of(federation.base, states, untuned)
    experts = {name: snapshot.experts[federation.owner(name)] for name in private}
    results = assemble_results(last.answers, last.routing, federation.base.sites, experts, cost)
    results = run.finish({**results, "data": asdict(federation.holdings)})
    federation.progress("answering", len(private), len(private))
    return results


@dataclass(frozen=True)
class _Lines:
    """What is found of clients when all is over, client by client."""

    metrics: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    answers: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    routing: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])


def _last_look(federation: Federation, snapshot: Snapshot) -> _Lines:
    """Measure every client's models on its test rows, and have them answer."""
    clients = list(federation.test)
    lines = {name: _Lines() for name in clients}
    for done, models in _models(federation, snapshot):
        federation.progress("answering", done, len(clients))
        looked = zip(
            models.clients, measured(federation, models), _said(federation, models), strict=True
        )
        for name, found, said in looked:
            own = lines[name]
            if models.kind != "base":
                own.metrics.append(loss_line(snapshot.round, models.kind, name, found))
            own.answers.extend(_answer_lines(name, models.kind, found, said))
            if federation.base.sites:
                own.routing.append(_routing_line(name, models.kind, found))
    return _Lines(
        [line for name in clients for line in lines[name].metrics],
        [line for name in clients for line in lines[name].answers],
        [line for name in clients for line in lines[name].routing],
    )


def _models(federation: Federation, snapshot: Snapshot) -> Iterator[tuple[int, Models]]:
    """Yield all models that a cohort can be served by, the base first, and how many clients came before."""
    for done, names in federation.cohorts(list(federation.test)):
        yield done, Models("base", names, [ClientState()])
        for models in models_of(federation, snapshot, names, {}, snapshot.server.shared):
            yield done, models


@dataclass(frozen=True, eq=False)
class _Private(Mapping[str, ClientState]):
    """What every client keeps, read when it is asked for: that of all need not be in memory at once."""

    federation: Federation
    snapshot: Snapshot

    def __getitem__(self, client: str) -> ClientState:
        return self.federation.private(self.snapshot, self.federation.owner(client))

    def __iter__(self) -> Iterator[str]:
        return iter(self.federation.test)

    def __len__(self) -> int:
        return len(self.federation.test)


def _write_options(federation: Federation, snapshot: Snapshot) -> None:
    """Measure what is measured on demand: forgetting, tasks, speed."""
    base, evaluation = federation.base, federation.settings.evaluation
    if federation.held_out:
        federation.run.write_forgetting(_forgetting(federation, snapshot))
    if federation.tasks is not None:
        asked = (federation.tokenizer, federation.tasks, evaluation.limit, federation.progress)
        lines = [task_lines(base, models, *asked) for models in _each_once(federation, snapshot)]
        federation.run.write_tasks([line for own in lines for line in own])
    if evaluation.speed:
        name, own = next(iter(_Private(federation, snapshot).items()))
        length = federation.settings.max_length - evaluation.new_tokens
        state = federation.state(name, snapshot.server.shared, own)
        speed = speed_of(base, state, length, evaluation.new_tokens)
        federation.run.write_speed(name, speed)


def _forgetting(federation: Federation, snapshot: Snapshot) -> list[dict[str, Any]]:
    windows, batch = federation.held_out, federation.settings.evaluation.batch

    def lines(base: FrozenBase, models: Models) -> list[list[dict[str, Any]]]:
        return forgetting_lines(base, models, windows, federation.pad_id, batch)

    return [
        line
        for models in _each_once(federation, snapshot)
        for own in (
            side_by_side(federation, models, lines)
            if models.clients
            else lines(federation.base, models)
        )
        for line in own
    ]


def _each_once(federation: Federation, snapshot: Snapshot) -> Iterator[Models]:
    """Yield the base and the shared model once, as nobody's in particular, and all personal ones."""
    for done, models in _models(federation, snapshot):
        if models.kind == "personal":
            yield models
        elif done == 0:
            yield replace(models, clients=())


def _publish(
    federation: Federation, shared: Mapping[str, Tensor], private: Mapping[str, ClientState]
) -> None:
    """Write what a user keeps, each part with the fingerprint of the base it belongs to."""
    settings, run, base = federation.settings, federation.run.path, federation.base
    origin = origin_of(base, settings.model, settings.template, settings.max_length)
    if settings.strategy.shares == "adapter":
        publish_shared(run, base, shared, origin)
    for name, own in private.items():
        adapter: Mapping[str, Tensor] = {}
        if own.adapter or name in settings.ranks:
            adapter = federation.state(name, shared, own).adapter
        publish_client(run, name, base, replace(own, adapter=adapter), origin)


def _said(federation: Federation, models: Models) -> list[list[dict[str, Any]]]:
    """Return what models answer to the first rows of their clients; as many at once as fill a batch."""
    settings = federation.settings
    count, batch = settings.evaluation.answers, settings.evaluation.batch
    if not count:
        return [[] for _ in models.clients]
    together = max(1, batch // count)

    def answer(base: FrozenBase, part: Models) -> list[list[dict[str, Any]]]:
        said: list[list[dict[str, Any]]] = []
        for start in range(0, len(part.clients), together):
            some = part.part(range(len(part.clients))[start : start + together])
            rows = [federation.answered[name] for name in some.clients]
            said += answers_of(
                base,
                some.states,
                rows,
                federation.tokenizer,
                settings.template,
                settings.max_length,
                settings.evaluation,
            )
        return said

    return side_by_side(federation, models, answer)


def _answer_lines(
    name: str, kind: str, found: Measured, said: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
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
        for row, loss in enumerate(found.losses)
    ]


def _routing_line(name: str, kind: str, found: Measured) -> dict[str, Any]:
    return {
        "client": name,
        "model": kind,
        "counts": found.counts_LE.tolist(),
        "tokens": found.tokens,
        "openness": found.openness,
    }
