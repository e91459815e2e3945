"""The rounds: sample → train → protect → aggregate → evaluate → commit, wherever the clients are."""

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import Any

from torch import Tensor

from pomona.artifacts.checkpoint import Snapshot
from pomona.federation.dp_sgd import DPSGD
from pomona.federation.measure import communication, message_bytes
from pomona.federation.privacy import epsilon, noise_key, protect
from pomona.federation.secure_sum import summed
from pomona.federation.settings import FederateSettings
from pomona.federation.strategies import Corrects, ServerState, Strategy, frozen_part
from pomona.federation.update import ClientState, Update, within
from pomona.pipelines.federate.early_stop import stopped
from pomona.pipelines.federate.engine import Answer, Engine
from pomona.pipelines.federate.figures import round_figures


def through_rounds(engine: Engine, snapshot: Snapshot) -> Snapshot:
    """Go from a snapshot to the last round, those of `finish` included."""
    settings = engine.settings
    engine.progress("rounds", snapshot.round, settings.last_round)
    for round_ in _remaining(engine, snapshot):
        step = train_round if round_ <= settings.rounds else finishing_round
        snapshot = step(engine, snapshot, round_)
    engine.progress("rounds", settings.last_round, settings.last_round)
    return snapshot


def _remaining(engine: Engine, snapshot: Snapshot) -> Iterator[int]:
    """Return the rounds after a snapshot, one by one; after an early stop only those of `finish`."""
    settings = engine.settings
    for round_ in range(snapshot.round + 1, settings.last_round + 1):
        if round_ > settings.rounds or not stopped(settings, engine.run, ()):
            yield round_


def train_round(engine: Engine, snapshot: Snapshot, round_: int) -> Snapshot:
    """Sample → train → aggregate → evaluate → commit; updates stream, the server holds one at a time."""
    settings, began = engine.settings, monotonic()
    strategy = settings.strategy
    chosen, answering = settings.drawn(engine.clients, round_)
    noted = _Noted()
    updates = noted.updates(engine.train(snapshot, answering, round_))
    server = strategy.aggregate(snapshot.server, _protected(engine, snapshot, updates, round_))
    deque(updates, maxlen=0)  # a strategy may have no use for them
    sent = sent_to_clients(strategy, snapshot.server)
    messages = {name: message_bytes(engine.sends(name, sent)) for name in chosen}
    metrics = [
        *noted.training(round_),
        communication(round_, messages, noted.received),
        *_spent_on_updates(engine, round_),
        *_spent_on_rows(engine, settings.local.dp_sgd, noted, round_),
    ]
    return _committed(engine, snapshot, round_, server, noted, metrics, began)


def finishing_round(engine: Engine, snapshot: Snapshot, round_: int) -> Snapshot:
    """Train what stays at the clients, after the last round; who is new is sent what is shared, once."""
    settings, began = engine.settings, monotonic()
    finish = settings.finishing
    assert finish is not None
    names = [name for name in engine.clients if settings.finishes(name)]
    noted = _Noted()
    deque(noted.updates(engine.train(snapshot, names, round_, finish)), maxlen=0)
    metrics = noted.training(round_)
    if round_ == settings.rounds + 1:
        metrics += _communication_of_newcomers(engine, snapshot.server, names, round_)
    metrics += _spent_on_rows(engine, finish.training.dp_sgd, noted, round_)
    return _committed(engine, snapshot, round_, snapshot.server, noted, metrics, began)


@dataclass
class _Noted:
    """What is kept of a round's answers, whose updates go on to the strategy one by one."""

    losses: dict[str, Sequence[float]] = field(default_factory=dict[str, Sequence[float]])
    private: dict[str, ClientState] = field(default_factory=dict[str, ClientState])
    received: dict[str, int] = field(default_factory=dict[str, int])
    epsilon: dict[str, float] = field(default_factory=dict[str, float])
    tokens: int = 0

    def updates(self, answers: Iterable[Answer]) -> Iterator[Update]:
        """Yield the updates of answers as they come, and note the rest of them."""
        for answer in answers:
            self.losses[answer.client] = answer.losses
            self.tokens += answer.tokens
            if answer.private is not None:
                self.private[answer.client] = answer.private
            if answer.epsilon is not None:
                self.epsilon[answer.client] = answer.epsilon
            update = answer.update
            if update is not None:
                self.received[answer.client] = message_bytes(update.message)
            del answer  # while the next one comes this one is nobody's
            if update is not None:
                yield update
            del update

    def training(self, round_: int) -> list[dict[str, Any]]:
        """Return a line of losses for everyone who has trained."""
        return [
            {"round": round_, "model": "training", "client": name, "losses": list(losses)}
            for name, losses in self.losses.items()
        ]


def _committed(
    engine: Engine,
    snapshot: Snapshot,
    round_: int,
    server: ServerState,
    noted: "_Noted",
    metrics: list[dict[str, Any]],
    began: float,
) -> Snapshot:
    """Evaluate when it is time and make the round final; the last one is evaluated when all is over."""
    settings, private, trained = engine.settings, noted.private, monotonic() - began
    metrics += engine.held_back(snapshot, private, server.shared, round_)
    enough = stopped(settings, engine.run, metrics)
    if enough and round_ < settings.rounds:
        engine.tell(
            f"round {round_}: stopped early, held-back rows are not answered better any more"
        )
    last = round_ if enough and not settings.finishing else settings.last_round
    if round_ % settings.evaluation.every == 0 and round_ != last:
        metrics += engine.evaluate(snapshot, private, server.shared, round_)
    committed = engine.run.commit(snapshot, round_, server, private, metrics)
    engine.run.note_time(
        {"round": round_, "training": trained, "round_seconds": monotonic() - began}
    )
    figures = round_figures(metrics, noted.tokens / trained)
    engine.progress("rounds", round_, settings.last_round, figures)
    return committed


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
    engine: Engine, server: ServerState, names: Sequence[str], round_: int
) -> list[dict[str, Any]]:
    shared = sent_to_newcomers(engine.settings, server)
    new = [name for name in names if engine.settings.is_new(name)]
    messages = {name: message_bytes(engine.sends(name, shared)) for name in new}
    return [communication(round_, messages, {})] if new else []


def _protected(
    engine: Engine, snapshot: Snapshot, updates: Iterator[Update], round_: int
) -> Iterable[Update]:
    """Return what the strategy may see of the updates; what clients noise themselves comes as it is."""
    privacy = engine.settings.privacy
    if engine.settings.secure_aggregation:
        return summed(snapshot.server.shared, updates)
    if privacy is None or privacy.where == "local":
        return updates
    key, _ = noise_key(engine.settings.seed)
    return protect(privacy, snapshot.server.shared, updates, key, round_)


def _spent_on_updates(engine: Engine, round_: int) -> list[dict[str, Any]]:
    """Tell and return the ε that sending updates has cost everybody so far."""
    settings, privacy = engine.settings, engine.settings.privacy
    if privacy is None:
        return []
    _, secret = noise_key(settings.seed)
    rounds = Counter(settings.sample(engine.clients, r) for r in range(1, round_ + 1))
    spent = epsilon(privacy, rounds)
    engine.tell(f"round {round_}: ε = {spent:.4g} at δ = {privacy.delta:g}")
    line = {"round": round_, "model": "privacy", "epsilon": spent}
    return [{**line, "delta": privacy.delta, "secret": secret}]


def _spent_on_rows(
    engine: Engine, dp: DPSGD | None, noted: _Noted, round_: int
) -> list[dict[str, Any]]:
    """Tell and return the ε that every client's steps on its rows have cost each of them so far."""
    if dp is None or not noted.epsilon:
        return []
    _, secret = noise_key(engine.settings.seed)
    told = ", ".join(f"{epsilon:.4g} ({name})" for name, epsilon in noted.epsilon.items())
    engine.tell(f"round {round_}: ε of a row = {told} at δ = {dp.delta:g}")
    return [
        {
            "round": round_,
            "model": "dp-sgd",
            "client": name,
            "epsilon": epsilon,
            "delta": dp.delta,
            "secret": secret,
        }
        for name, epsilon in noted.epsilon.items()
    ]
