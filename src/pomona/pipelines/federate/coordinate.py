"""Federate across sites: the coordinator's side. It has no rows and sees no client's own parts."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from pomona.artifacts.about import read_about
from pomona.artifacts.arrived import Arrived
from pomona.artifacts.checkpoint import Snapshot
from pomona.artifacts.inputs import inputs_of
from pomona.artifacts.origin import origin_of
from pomona.artifacts.publish import publish_shared
from pomona.artifacts.results import of_model
from pomona.artifacts.run import RunDirectory
from pomona.data.duplicates import Duplicates, Repeated
from pomona.evaluation.loss import RowLoss
from pomona.federation.holdings import Holdings
from pomona.federation.measure import loss_summary
from pomona.federation.settings import FederateSettings
from pomona.models.loading import load_model
from pomona.models.placement import find_device, moved
from pomona.models.received import encoded
from pomona.parcel import Parcel
from pomona.pipelines.federate.across import Across
from pomona.pipelines.federate.asking import Asking, Hello, Patience, Sites
from pomona.pipelines.federate.first_adapter import dealt, first_adapter
from pomona.pipelines.federate.heard import FIGURES
from pomona.pipelines.federate.prepare import frozen_base
from pomona.pipelines.federate.rounds import through_rounds
from pomona.progress import Progress, Tell, silent, unheard

_LAST_SECONDS = 10.0


def coordinate(
    settings: FederateSettings,
    run: RunDirectory,
    recipe: str,
    names: Sequence[str],
    sites: Sites,
    patience: Patience,
    progress: Progress = silent,
    tell: Tell = unheard,
    device: str = "auto",
) -> dict[str, Any]:
    """Run, or go on with, a federation of sites in `run` and return its results.

    `recipe` is what sites are told (`recipe.remote`), `names` who they are. Raises `PomonaError` for whatever
    is wrong with the model, the disk, or too few answers.
    """
    settings.check_clients(list(names))
    inputs = inputs_of(settings.model, {}, progress, settings.warm_start)
    run.claim(inputs)
    if run.finished:
        return run.results()
    model = load_model(settings.model, settings.dtype)
    base = frozen_base(settings, moved(model, find_device(device)))
    server_first, _ = dealt(settings.strategy, first_adapter(settings, base))
    federation_id = str(read_about(run.path / "run.json")["federation"])
    first = encoded(server_first) if settings.warm_start else b""
    hello = Hello(federation_id, recipe, inputs.model, first)
    engine = Across(
        settings,
        run,
        base,
        server_first,
        sorted(names),
        Asking(sites, patience, hello, progress, tell),
    )
    run.stay()  # sites that have been greeted go on in this federation and no other
    engine.asking.greet(engine.clients)
    return _finished(engine, through_rounds(engine, _started(engine, server_first)))


def _started(engine: Across, first: dict[str, Tensor]) -> Snapshot:
    """Go on where the run is, or begin; only a warm start's values are sent to somebody later."""
    snapshot = engine.run.snapshot([]) or _begun(engine)
    if engine.settings.warm_start is None:
        first |= {name: torch.empty_like(value, device="meta") for name, value in first.items()}
    return snapshot


def _begun(engine: Across) -> Snapshot:
    """Begin with whoever is there; a site that comes later is told when it is first asked."""
    lines = [line for name in engine.clients for line in _base_lines(engine, name)]
    first = dict(engine.server_first)
    return engine.run.begin(engine.settings.strategy.init(first), {}, lines)


def _base_lines(engine: Across, name: str) -> list[dict[str, Any]]:
    return engine.asking.present[name].lines if name in engine.asking.present else []


def _finished(engine: Across, snapshot: Snapshot) -> dict[str, Any]:
    """Hear every site's last figures, publish what is shared, write the results last."""
    run, settings, shared = engine.run, engine.settings, snapshot.server.shared
    Arrived(run.path / "arrived").clear()
    (run.path / "opening.json").unlink(missing_ok=True)
    found = engine.finish(snapshot.server, snapshot.round)
    if settings.strategy.shares == "adapter":
        origin = origin_of(engine.base, settings.model, settings.template, settings.max_length)
        publish_shared(run.path, engine.base, shared, origin)
    answers = [row for own in found.values() for row in own]
    run.add_metrics(_last_lines(found, snapshot.round))
    run.write_answers(answers)
    figures = {
        model: of_model([row for row in answers if row["model"] == model]) for model in FIGURES
    }
    beside: dict[str, Any] = {"selection": None, "gate_openness": None, "routing": {}}
    finished = run.finish({**figures, **beside, "data": asdict(_holdings(engine, list(found)))})
    goodbye = {name: Parcel("bye") for name in found}
    deque(engine.asking.sites.ask(goodbye, _LAST_SECONDS), maxlen=0)
    return finished


def _last_lines(
    found: Mapping[str, Sequence[Mapping[str, Any]]], round_: int
) -> list[dict[str, Any]]:
    """Return the loss of every model but the base, whose line is the first."""
    lines: list[dict[str, Any]] = []
    for name, own in found.items():
        for model in FIGURES[1:]:
            rows = [RowLoss(row["nats"], row["tokens"]) for row in own if row["model"] == model]
            if rows:
                lines.append(
                    {"round": round_, "model": model, "client": name, **loss_summary(rows)}
                )
    return lines


def _holdings(engine: Across, names: Sequence[str]) -> Holdings:
    """Return how many rows every site has: of what kind they are it does not tell."""
    present = {name: engine.asking.present[name] for name in names}
    total = Repeated(sum(own.test for own in present.values()), 0, 0, 0)
    return Holdings(
        ["rows"],
        {name: [own.train] for name, own in present.items()},
        {name: [own.test] for name, own in present.items()},
        Duplicates(total, {n: Repeated(own.test, 0, 0, 0) for n, own in present.items()}, None),
    )
