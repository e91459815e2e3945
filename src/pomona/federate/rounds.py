"""The rounds: sample → train cohorts → protect → aggregate → evaluate → commit."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from time import monotonic
from typing import Any

from torch import Tensor

from pomona.artifacts.checkpoint import Snapshot
from pomona.federate.early_stop import held_back_losses, stopped
from pomona.federate.evaluate import evaluate
from pomona.federate.prepare import Federation
from pomona.federation.cohort import FrozenBase
from pomona.federation.dp_sgd import row_epsilon, steps_of
from pomona.federation.local import LocalTraining, Trained, train_cohort
from pomona.federation.measure import communication
from pomona.federation.privacy import epsilon, noise_key, protect
from pomona.federation.settings import FederateSettings, Finish
from pomona.federation.stage import Task
from pomona.federation.strategies import (
    Corrects,
    Hears,
    LocalOnly,
    ServerState,
    SharedFixed,
    Strategy,
    frozen_part,
)
from pomona.federation.update import ClientState, Update, split, within


def remaining(federation: Federation, snapshot: Snapshot) -> Iterator[int]:
    """Return the rounds after a snapshot, one by one; after an early stop only those of `finish`."""
    settings = federation.settings
    for round_ in range(snapshot.round + 1, settings.last_round + 1):
        if round_ > settings.rounds or not stopped(federation, ()):
            yield round_


def train_round(federation: Federation, snapshot: Snapshot, round_: int) -> Snapshot:
    """Sample → train cohorts → aggregate → evaluate → commit."""
    settings, began = federation.settings, monotonic()
    strategy = settings.strategy
    chosen, answering = settings.drawn(federation.train, round_)
    private: dict[str, ClientState] = {}
    updates: list[Update] = []
    metrics: list[dict[str, Any]] = []
    for name, trained in _train(federation, snapshot, answering, round_):
        shared, private[name] = split(trained.state, strategy.shares, frozen_part(strategy))
        if shared:
            shared = {**federation.sends(name, shared), **trained.report}
            loss = strategy.told(trained.losses) if isinstance(strategy, Hears) else None
            updates.append(Update(name, len(federation.train[name]), shared, loss))
        metrics.append(_training_line(round_, name, trained))
    protected, spent = _protect(federation, snapshot, updates, round_)
    server = strategy.aggregate(snapshot.server, protected)
    sent = sent_to_clients(strategy, snapshot.server)
    messages = {name: federation.sends(name, sent) for name in chosen}
    metrics += [communication(round_, messages, updates), *spent]
    metrics += _spent_on_rows(federation, settings.local, private, round_)
    return _committed(federation, snapshot, round_, server, private, metrics, began)


def finishing_round(federation: Federation, snapshot: Snapshot, round_: int) -> Snapshot:
    """Train what stays at the clients, after the last round; who is new is sent what is shared, once."""
    settings, began = federation.settings, monotonic()
    finish = settings.finishing
    assert finish is not None
    strategy = LocalOnly() if finish.adapter else SharedFixed(settings.strategy.shares)
    names = [name for name in federation.train if settings.finishes(name)]
    private: dict[str, ClientState] = {}
    metrics: list[dict[str, Any]] = []
    for name, trained in _train(federation, snapshot, names, round_, strategy, finish):
        private[name] = split(trained.state, strategy.shares, frozen_part(strategy))[1]
        metrics.append(_training_line(round_, name, trained))
    if round_ == settings.rounds + 1:
        metrics += _communication_of_newcomers(federation, snapshot.server, names, round_)
    metrics += _spent_on_rows(federation, finish.training, private, round_)
    return _committed(federation, snapshot, round_, snapshot.server, private, metrics, began)


def _committed(
    federation: Federation,
    snapshot: Snapshot,
    round_: int,
    server: ServerState,
    private: Mapping[str, ClientState],
    metrics: list[dict[str, Any]],
    began: float,
) -> Snapshot:
    """Evaluate when it is time and make the round final; the last one is evaluated when all is over."""
    settings, trained = federation.settings, monotonic() - began
    metrics += held_back_losses(federation, snapshot, private, server.shared, round_)
    enough = stopped(federation, metrics)
    if enough and round_ < settings.rounds:
        federation.tell(
            f"round {round_}: stopped early, held-back rows are not answered better any more"
        )
    last = round_ if enough and not settings.finishing else settings.last_round
    if round_ % settings.evaluation.every == 0 and round_ != last:
        metrics += evaluate(federation, snapshot, private, server.shared, round_)
    committed = federation.run.commit(snapshot, round_, server, private, metrics)
    federation.run.note_time(
        {"round": round_, "training": trained, "round_seconds": monotonic() - began}
    )
    return committed


def _train(
    federation: Federation,
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

    def train(base: FrozenBase, tasks: Sequence[Task]) -> list[Trained]:
        rule, seed = strategy or settings.strategy, settings.seed
        drawn_by = f"{seed}/finish" if finish else seed
        return train_cohort(base, tasks, training, rule, drawn_by, done, of, federation.pad_id)

    for _, some in federation.cohorts(names):
        tasks = [
            Task(
                name,
                federation.state(name, server.shared, federation.private(snapshot, name)),
                federation.train[name],
                server.memory,
            )
            for name in some
        ]
        trained = federation.replicas.map(train, tasks)
        yield from zip((task.client for task in tasks), trained, strict=True)


def _training_line(round_: int, name: str, trained: Trained) -> dict[str, Any]:
    return {"round": round_, "model": "training", "client": name, "losses": trained.losses}


def sent_to_clients(strategy: Strategy, server: ServerState) -> dict[str, Tensor]:
    """Return what goes to every client: what can have changed since the last round."""
    memory = server.memory if isinstance(strategy, Corrects) else {}
    changed = {n: v for n, v in server.shared.items() if not within(n, frozen_part(strategy))}
    return {**changed, **memory}


def sent_to_newcomers(settings: FederateSettings, server: ServerState) -> dict[str, Tensor]:
    """Return what goes once to everybody who is in no round: what is shared.

    In a federation that is over (`rounds` 0) that is all of it, since nothing of it was drawn here.
    """
    if settings.only_finishes:
        return dict(server.shared)
    return sent_to_clients(settings.strategy, replace(server, memory={}))


def _communication_of_newcomers(
    federation: Federation, server: ServerState, names: Sequence[str], round_: int
) -> list[dict[str, Any]]:
    shared = sent_to_newcomers(federation.settings, server)
    new = [name for name in names if federation.settings.is_new(name)]
    messages = {name: federation.sends(name, shared) for name in new}
    return [communication(round_, messages, [])] if new else []


def _protect(
    federation: Federation,
    snapshot: Snapshot,
    updates: Sequence[Update],
    round_: int,
) -> tuple[Sequence[Update], list[dict[str, Any]]]:
    """Return what the server may see of the updates, and the ε that this has cost so far."""
    settings, privacy = federation.settings, federation.settings.privacy
    if privacy is None:
        return updates, []
    key, secret = noise_key(settings.seed)
    rounds = Counter(settings.sample(federation.train, r) for r in range(1, round_ + 1))
    spent = epsilon(privacy, rounds)
    federation.tell(f"round {round_}: ε = {spent:.4g} at δ = {privacy.delta:g}")
    line = {
        "round": round_,
        "model": "privacy",
        "epsilon": spent,
        "delta": privacy.delta,
        "secret": secret,
    }
    return protect(privacy, snapshot.server.shared, updates, key, round_), [line]


def _spent_on_rows(
    federation: Federation,
    training: LocalTraining,
    trained: Mapping[str, ClientState],
    round_: int,
) -> list[dict[str, Any]]:
    """Tell and return the ε that every client's steps on its rows have cost each of them so far."""
    dp = training.dp_sgd
    if dp is None or not trained:
        return []
    _, secret = noise_key(federation.settings.seed)
    spent = {
        name: row_epsilon(dp, len(federation.train[name]), training.batch, steps_of(private.memory))
        for name, private in trained.items()
    }
    told = ", ".join(f"{epsilon:.4g} ({name})" for name, epsilon in spent.items())
    federation.tell(f"round {round_}: ε of a row = {told} at δ = {dp.delta:g}")
    return [
        {
            "round": round_,
            "model": "dp-sgd",
            "client": name,
            "epsilon": epsilon,
            "delta": dp.delta,
            "secret": secret,
        }
        for name, epsilon in spent.items()
    ]
