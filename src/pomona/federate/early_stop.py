"""When the rounds are over before their number: rows that nobody trains on are measured."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from pomona.artifacts.checkpoint import Snapshot
from pomona.federate.evaluate import served
from pomona.federate.prepare import Federation
from pomona.federation.measure import loss_summary, losses_of
from pomona.federation.update import ClientState

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
    lines: list[dict[str, Any]] = []
    for name, examples in federation.held_back.items():
        if name in settings.newcomers:
            continue
        own = private.get(name) or federation.private(snapshot, name)
        state = served(federation, name, shared, own)
        losses = losses_of(federation.base, state, examples, federation.pad_id, settings.evaluation)
        lines.append({"round": round_, "model": _HELD_BACK, "client": name, **loss_summary(losses)})
    return lines


def stopped(federation: Federation, fresh: Sequence[Mapping[str, Any]]) -> bool:
    """Whether held-back rows say that it is enough: `fresh` are lines that are not committed yet."""
    stop = federation.settings.early_stop
    if stop is None:
        return False
    losses: dict[int, list[float]] = {}
    for line in (*federation.run.metrics(), *fresh):
        if line["model"] == _HELD_BACK:
            losses.setdefault(line["round"], []).append(line["loss"])
    return stop.reached([sum(own) / len(own) for _, own in sorted(losses.items())])
