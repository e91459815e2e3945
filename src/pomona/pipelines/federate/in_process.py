"""The engine of a simulation: all clients in this process, a cohort at a time in one batch."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from pomona.artifacts.checkpoint import Snapshot
from pomona.artifacts.run import RunDirectory
from pomona.federation.cohort import FrozenBase
from pomona.federation.compression import without_error
from pomona.federation.dp_sgd import row_epsilon, steps_of
from pomona.federation.local import LocalTraining, Trained, train_cohort
from pomona.federation.privacy import noise_key, protect
from pomona.federation.settings import FederateSettings, Finish
from pomona.federation.stage import Task
from pomona.federation.strategies import (
    Hears,
    LocalOnly,
    ServerState,
    SharedFixed,
    Strategy,
    frozen_part,
)
from pomona.federation.update import ClientState, Update, split
from pomona.federation.wire import to_wire
from pomona.pipelines.federate.early_stop import held_back_losses
from pomona.pipelines.federate.engine import Answer
from pomona.pipelines.federate.evaluate import evaluate
from pomona.pipelines.federate.prepare import Federation
from pomona.progress import Progress, Tell


@dataclass(frozen=True)
class InProcess:
    """Clients whose rows are here: what they keep is given back to be committed with the round."""

    federation: Federation

    @property
    def settings(self) -> FederateSettings:
        """The federation, whole."""
        return self.federation.settings

    @property
    def run(self) -> RunDirectory:
        """Where everything is kept."""
        return self.federation.run

    @property
    def progress(self) -> Progress:
        """Hears how far a stage is."""
        return self.federation.progress

    @property
    def tell(self) -> Tell:
        """Hears what a user should know at once."""
        return self.federation.tell

    @property
    def clients(self) -> Sequence[str]:
        """Who has rows to train on."""
        return list(self.federation.train)

    def sends(self, client: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what travels of an adapter to a client: no more than its rank."""
        return self.federation.sends(client, tensors)

    def train(
        self, snapshot: Snapshot, names: Sequence[str], round_: int, finish: Finish | None = None
    ) -> Iterator[Answer]:
        """Train clients, a cohort at a time; after the last round as `finish` says."""
        federation, settings = self.federation, self.settings
        training = finish.training if finish else settings.local
        rule = _finishing(settings.strategy, finish) if finish else settings.strategy
        shares, frozen = rule.shares, frozen_part(rule)
        for name, trained in _trained(federation, snapshot, names, round_, rule, finish):
            sent, private = split(trained.state, shares, frozen)
            rows, update = len(federation.train[name]), None
            if sent and not finish:
                update = _update(federation, name, sent, trained, snapshot.server, round_)
                began = federation.sends(name, snapshot.server.shared)
                before = federation.private(snapshot, name).memory
                update, memory = to_wire(settings, began, update, private.memory, before)
                private = replace(private, memory=memory)
            epsilon = _epsilon(training, rows, private)
            yield Answer(name, trained.losses, update, private, epsilon, trained.tokens)

    def evaluate(
        self,
        snapshot: Snapshot,
        private: Mapping[str, ClientState],
        shared: Mapping[str, Tensor],
        round_: int,
    ) -> list[dict[str, Any]]:
        """Measure the shared model and every personal one on each client's test rows."""
        return evaluate(self.federation, snapshot, private, shared, round_)

    def held_back(
        self,
        snapshot: Snapshot,
        private: Mapping[str, ClientState],
        shared: Mapping[str, Tensor],
        round_: int,
    ) -> list[dict[str, Any]]:
        """Measure every client's model on the rows it holds back, when it is time to look."""
        return held_back_losses(self.federation, snapshot, private, shared, round_)


def _trained(
    federation: Federation,
    snapshot: Snapshot,
    names: Sequence[str],
    round_: int,
    rule: Strategy,
    finish: Finish | None,
) -> Iterator[tuple[str, Trained]]:
    settings, server = federation.settings, snapshot.server
    training, done, of = settings.local, round_, settings.rounds
    if finish is not None:
        training, done, of = finish.training, round_ - settings.rounds, finish.rounds
    drawn_by = f"{settings.seed}/finish" if finish else settings.seed

    def train(base: FrozenBase, tasks: Sequence[Task]) -> list[Trained]:
        return train_cohort(base, tasks, training, rule, drawn_by, done, of, federation.pad_id)

    for _, some in federation.cohorts(names):
        tasks = [
            Task(
                name,
                federation.state(name, server.shared, _trainable(federation, snapshot, name)),
                federation.train[name],
                server.memory,
            )
            for name in some
        ]
        trained = federation.replicas.map(train, tasks)
        yield from zip((task.client for task in tasks), trained, strict=True)


def _trainable(federation: Federation, snapshot: Snapshot, name: str) -> ClientState:
    """Return what a client keeps but for what training has no use for."""
    private = federation.private(snapshot, name)
    return replace(private, memory=without_error(private.memory))


def _finishing(strategy: Strategy, finish: Finish) -> Strategy:
    """Return what is trained after the last round: all of it, or what stays at the client alone."""
    return LocalOnly() if finish.adapter else SharedFixed(strategy.shares)


def _update(
    federation: Federation,
    name: str,
    sent: Mapping[str, Tensor],
    trained: Trained,
    server: ServerState,
    round_: int,
) -> Update:
    """Return what a client sends: clipped and noised, where the server is not to see it as it is."""
    strategy, rows = federation.settings.strategy, len(federation.train[name])
    shared = {**federation.sends(name, sent), **trained.report}
    loss = strategy.told(trained.losses) if isinstance(strategy, Hears) else None
    update, privacy = Update(name, rows, shared, loss), federation.settings.privacy
    if privacy is None or privacy.where == "central":
        return update
    key, _ = noise_key(federation.settings.seed)
    (noised,) = protect(privacy, server.shared, [update], key, round_)
    return noised


def _epsilon(training: LocalTraining, rows: int, private: ClientState) -> float | None:
    """Return the ε that a client's steps on its rows have cost each of them so far, if they are noised."""
    dp = training.dp_sgd
    return dp and row_epsilon(dp, rows, training.batch, steps_of(private.memory))
