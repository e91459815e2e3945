"""Every model that a client can be served by, measured on its own test rows."""

from collections.abc import Mapping
from math import isfinite
from typing import Any

from torch import Tensor

from pomona.artifacts.checkpoint import Snapshot
from pomona.errors import PomonaError
from pomona.federate.prepare import Federation
from pomona.federation.measure import Measured, measured_of
from pomona.federation.update import ClientState


def evaluate(
    federation: Federation,
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
        own = private.get(owner) or federation.private(snapshot, owner)
        for kind, state in models_of(federation, owner, shared, own).items():
            lines.append(loss_line(round_, kind, name, measured(federation, name, state)))
    federation.progress("evaluating", len(federation.test), len(federation.test))
    return lines


def models_of(
    federation: Federation, client: str, shared: Mapping[str, Tensor], private: ClientState
) -> dict[str, ClientState]:
    """Return the models a client can be served by: the shared one and, if it has one, its own."""
    models: dict[str, ClientState] = {}
    if federation.settings.strategy.shares == "adapter":  # less than that is no model
        models["shared"] = ClientState(shared)
    if private.private or federation.settings.ranks:
        models["personal"] = federation.state(client, shared, private)
    return models


def served(
    federation: Federation, client: str, shared: Mapping[str, Tensor], private: ClientState
) -> ClientState:
    """Return the model that serves a client: its own, or the shared one where it has none."""
    models = models_of(federation, client, shared, private)
    return models.get("personal") or models["shared"]


def loss_line(round_: int, kind: str, name: str, found: Measured) -> dict[str, Any]:
    """Return the metrics of one model on a client's test rows; raises `PomonaError` if not finite."""
    summary = found.summary()
    if not isfinite(summary["loss"]):
        raise PomonaError(
            f'client "{name}": the loss of the {kind} model is not finite after round {round_}; '
            "lower local.learning_rate, or check the base model"
        )
    return {"round": round_, "model": kind, "client": name, **summary}


def measured(federation: Federation, name: str, state: ClientState) -> Measured:
    """Measure one model on a client's test rows."""
    return measured_of(
        federation.base,
        state,
        federation.test[name],
        federation.pad_id,
        federation.settings.evaluation,
    )
