"""When the rounds are over before their number: rows that nobody trains on are measured."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from pomona.artifacts.checkpoint import Snapshot
from pomona.artifacts.run import RunDirectory
from pomona.evaluation.loss import RowLoss
from pomona.federation.cohort import FrozenBase
from pomona.federation.measure import Models, loss_summary, losses_of
from pomona.federation.settings import FederateSettings
from pomona.federation.update import ClientState
from pomona.pipelines.federate.evaluate import models_of, served, side_by_side
from pomona.pipelines.federate.prepare import Federation

_HELD_BACK = "held back"


def held_back_losses(
    federation: Federation,
    snapshot: Snapshot,
    private: Mapping[str, ClientState],
    shared: Mapping[str, Tensor],
    round_: int,
) -> list[dict[str, Any]]:
    """Return the loss of every client's model on the rows it holds back, when it is time to look."""
    settings, stop = federation.settings, federation.settings.early_stop
    if stop is None or round_ % stop.every or round_ > settings.rounds:
        return []

    def losses(base: FrozenBase, models: Models) -> list[list[RowLoss]]:
        rows = [federation.held_back[name] for name in models.clients]
        batch = settings.evaluation.batch
        return losses_of(base, models.states, rows, federation.pad_id, batch)

    lines: list[dict[str, Any]] = []
    looking = [name for name in federation.held_back if name not in settings.newcomers]
    for _, names in federation.cohorts(looking):
        for models in served(models_of(federation, snapshot, names, private, shared)):
            found = side_by_side(federation, models, losses)
            lines += [
                {"round": round_, "model": _HELD_BACK, "client": name, **loss_summary(own)}
                for name, own in zip(models.clients, found, strict=True)
            ]
    return lines


def stopped(
    settings: FederateSettings, run: RunDirectory, fresh: Sequence[Mapping[str, Any]]
) -> bool:
    """Whether held-back rows say that it is enough: `fresh` are lines that are not committed yet."""
    stop = settings.early_stop
    if stop is None:
        return False
    losses: dict[int, list[float]] = {}
    for line in (*run.metrics(), *fresh):
        if line["model"] == _HELD_BACK:
            losses.setdefault(line["round"], []).append(line["loss"])
    return stop.reached([sum(own) / len(own) for _, own in sorted(losses.items())])
