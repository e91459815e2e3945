"""Before the first round: every client chooses the experts that its grafts grow from."""

from typing import Any

from pomona.artifacts.checkpoint import Snapshot
from pomona.data.examples import collate
from pomona.federate.evaluate import loss_line, measured
from pomona.federate.prepare import Federation
from pomona.federation.cohort import FrozenBase
from pomona.federation.graft import choose_experts
from pomona.federation.measure import Models
from pomona.federation.update import ClientState
from pomona.seeds import seed_of


def begin(federation: Federation) -> Snapshot:
    """Choose every client's experts, measure the untuned base."""
    experts: dict[str, list[list[int]]] = {}
    lines: list[dict[str, Any]] = []
    for done, names in federation.cohorts(list(federation.train)):
        federation.progress("grafting", done, len(federation.train))
        chosen = federation.replicas.map(
            lambda base, some: [_select(federation, base, name) for name in some], names
        )
        experts |= dict(zip(names, chosen, strict=True))
    federation.progress("grafting", len(experts), len(experts))
    for _, names in federation.cohorts(list(federation.test)):
        found = measured(federation, Models("base", names, [ClientState()]))
        lines += [loss_line(0, "base", *own) for own in zip(names, found, strict=True)]
    server = federation.settings.strategy.init(federation.server_first)
    return federation.run.begin(server, experts, lines)


def _select(federation: Federation, base: FrozenBase, name: str) -> list[list[int]]:
    """Choose from the client's own training rows and nothing else."""
    graft, examples = federation.settings.graft, federation.train[name]
    if graft is None:
        return []
    batches = [collate(examples[i : i + 8], federation.pad_id) for i in range(0, len(examples), 8)]
    seed = seed_of(federation.settings.seed, "selection", name)
    return choose_experts(base.model, base.sites, graft, batches, seed)
