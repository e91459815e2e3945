"""What is left when the rounds are over: answers, routing, cost, and the folders that a user keeps."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from pomona.artifacts.checkpoint import Snapshot
from pomona.artifacts.origin import origin_of
from pomona.artifacts.publish import publish_client, publish_shared
from pomona.artifacts.results import assemble_results
from pomona.federate.evaluate import loss_line, measured, models_of
from pomona.federate.prepare import Federation
from pomona.federation.cost import cost_of
from pomona.federation.forgetting import forgetting_lines, task_lines
from pomona.federation.measure import Measured, answers_of, speed_of
from pomona.federation.update import ClientState


def finish(federation: Federation, snapshot: Snapshot) -> dict[str, Any]:
    """Evaluate answers, publish what a user keeps, write the results last."""
    run, shared = federation.run, snapshot.server.shared
    answers: list[dict[str, Any]] = []
    routing: list[dict[str, Any]] = []
    metrics: list[dict[str, Any]] = []
    private = _Private(federation, snapshot)
    for done, (name, models, said) in enumerate(_answered(federation, shared, private)):
        federation.progress("answering", done, len(private))
        for kind, state in models.items():
            found = measured(federation, name, state)
            if kind != "base":
                metrics.append(loss_line(snapshot.round, kind, name, found))
            answers += _answer_lines(name, kind, found, said[kind])
            if federation.base.sites:
                routing.append(_routing_line(name, kind, found))
    _publish(federation, shared, private)
    run.add_metrics(metrics)
    run.write_answers(answers)
    _write_options(federation, shared, private)
    states = (federation.state(n, shared, own) for n, own in private.items())
    untuned = [line for line in routing if line["model"] == "base"]
    cost = cost_of(federation.base, states, untuned)
    experts = {name: snapshot.experts[federation.owner(name)] for name in private}
    results = assemble_results(answers, routing, federation.base.sites, experts, cost)
    results = run.finish({**results, "data": asdict(federation.holdings)})
    federation.progress("answering", len(private), len(private))
    return results


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


def _write_options(
    federation: Federation, shared: Mapping[str, Tensor], private: Mapping[str, ClientState]
) -> None:
    """Measure what is measured on demand: forgetting, tasks, speed."""
    base, evaluation = federation.base, federation.settings.evaluation
    if federation.held_out:
        models = _every_model(federation, shared, private)
        lines = forgetting_lines(base, models, federation.held_out, evaluation.batch)
        federation.run.write_forgetting(list(lines))
    if federation.tasks is not None:
        models = _every_model(federation, shared, private)
        asked = (federation.tokenizer, federation.tasks, evaluation.limit, federation.progress)
        federation.run.write_tasks(list(task_lines(base, models, *asked)))
    if evaluation.speed:
        name, own = next(iter(private.items()))
        length = federation.settings.max_length - evaluation.new_tokens
        state = federation.state(name, shared, own)
        speed = speed_of(base, state, length, evaluation.new_tokens)
        federation.run.write_speed(name, speed)


def _every_model(
    federation: Federation, shared: Mapping[str, Tensor], private: Mapping[str, ClientState]
) -> Iterator[tuple[str, str | None, ClientState]]:
    """Yield (model, client, state); the client is None for what all clients have."""
    yield "base", None, ClientState()
    for place, (name, own) in enumerate(private.items()):
        served = models_of(federation, federation.owner(name), shared, own)
        if "shared" in served and place == 0:
            yield "shared", None, served["shared"]
        if "personal" in served:
            yield "personal", name, served["personal"]


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


def _answered(
    federation: Federation, shared: Mapping[str, Tensor], private: Mapping[str, ClientState]
) -> Iterator[tuple[str, dict[str, ClientState], dict[str, list[dict[str, Any]]]]]:
    """Yield every client with its models and what each says to its first rows.

    So many clients answer at once as fill a batch with their rows.
    """
    evaluation, names = federation.settings.evaluation, list(private)
    together = max(1, evaluation.batch // max(1, evaluation.answers))
    for start in range(0, len(names), together):
        some = names[start : start + together]
        models = {
            name: {
                "base": ClientState(),
                **models_of(federation, federation.owner(name), shared, private[name]),
            }
            for name in some
        }
        said = {
            kind: _said(federation, some, [models[name][kind] for name in some], kind)
            for kind in models[some[0]]
        }
        for place, name in enumerate(some):
            yield name, models[name], {kind: own[place] for kind, own in said.items()}


def _said(
    federation: Federation, names: Sequence[str], states: Sequence[ClientState], kind: str
) -> list[list[dict[str, Any]]]:
    settings = federation.settings
    count = settings.evaluation.answers
    if not count:
        return [[] for _ in names]
    return answers_of(
        federation.base,
        states if kind == "personal" else states[:1],
        [federation.rows[name].test[: min(count, len(federation.test[name]))] for name in names],
        federation.tokenizer,
        settings.template,
        settings.max_length,
        settings.evaluation,
    )


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
