"""Every model that a client can be served by, measured on its own test rows."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import isfinite
from typing import Any, TypeVar

from torch import Tensor

from pomona.artifacts.checkpoint import Snapshot
from pomona.errors import PomonaError
from pomona.federation.cohort import FrozenBase
from pomona.federation.measure import Measured, Models, measured_of
from pomona.federation.update import ClientState
from pomona.pipelines.federate.prepare import Federation

Found = TypeVar("Found")


def evaluate(
    federation: Federation,
    snapshot: Snapshot,
    private: Mapping[str, ClientState],
    shared: Mapping[str, Tensor],
    round_: int,
) -> list[dict[str, Any]]:
    """Measure the shared model and every personal model on each client's test rows."""
    lines: dict[str, list[dict[str, Any]]] = {name: [] for name in federation.test}
    for done, names in federation.cohorts(list(lines)):
        federation.progress("evaluating", done, len(lines))
        for models in models_of(federation, snapshot, names, private, shared):
            found = measured(federation, models)
            for name, one in zip(models.clients, found, strict=True):
                lines[name].append(loss_line(round_, models.kind, name, one))
    federation.progress("evaluating", len(lines), len(lines))
    return [line for own in lines.values() for line in own]


def models_of(
    federation: Federation,
    snapshot: Snapshot,
    names: Sequence[str],
    private: Mapping[str, ClientState],
    shared: Mapping[str, Tensor],
) -> list[Models]:
    """Return the models that clients can be served by: the shared one and, of those who have one, their own.

    `private` is what clients keep and the snapshot does not know yet.
    """
    found: list[Models] = []
    if federation.settings.strategy.shares == "adapter":  # less than that is no model
        found.append(Models("shared", names, [ClientState(shared)]))
    owners = dict.fromkeys(map(federation.owner, names))
    kept = {who: private.get(who) or federation.private(snapshot, who) for who in owners}
    own = {
        name: federation.state(name, shared, kept[federation.owner(name)])
        for name in names
        if kept[federation.owner(name)].private or federation.settings.ranks
    }
    if own:
        states = list(own.values())
        found.append(Models("personal", list(own), states[: len(owners)]))
    return found


def served(models: Sequence[Models]) -> list[Models]:
    """Return of clients' models those that serve them: their own, or the shared one where there is none."""
    *others, best = models
    left = [name for one in others for name in one.clients if name not in best.clients]
    return [*(replace(one, clients=left) for one in others if left), best]


def loss_line(round_: int, kind: str, name: str, found: Measured) -> dict[str, Any]:
    """Return the metrics of one model on a client's test rows; raises `PomonaError` if not finite."""
    summary = found.summary()
    if not isfinite(summary["loss"]):
        raise PomonaError(
            f'client "{name}": the loss of the {kind} model is not finite after round {round_}; '
            "lower local.learning_rate, or check the base model"
        )
    return {"round": round_, "model": kind, "client": name, **summary}


def measured(federation: Federation, models: Models) -> list[Measured]:
    """Measure models on the test rows of their clients."""

    def measure(base: FrozenBase, part: Models) -> list[Measured]:
        rows = [federation.test[name] for name in part.clients]
        batch = federation.settings.evaluation.batch
        return measured_of(base, part.states, rows, federation.pad_id, batch)

    return side_by_side(federation, models, measure)


def side_by_side(
    federation: Federation, models: Models, work: Callable[[FrozenBase, Models], Sequence[Found]]
) -> list[Found]:
    """Return what `work` finds for every client, with the clients dealt to the replicas of the base."""
    return federation.replicas.map(
        lambda base, places: work(base, models.part(places)), range(len(models.clients))
    )
