"""Before the first round: every client chooses the experts that its grafts grow from."""

from pomona.artifacts.checkpoint import Snapshot
from pomona.data.examples import collate
from pomona.federate.evaluate import loss_line, measured
from pomona.federate.prepare import Federation
from pomona.federation.graft import choose_experts
from pomona.federation.update import ClientState
from pomona.seeds import seed_of


def begin(federation: Federation) -> Snapshot:
    """Choose every client's experts, measure the untuned base."""
    experts: dict[str, list[list[int]]] = {}
    for done, name in enumerate(federation.train):
        federation.progress("grafting", done, len(federation.train))
        experts[name] = _select(federation, name)
    federation.progress("grafting", len(experts), len(experts))
    metrics = [
        loss_line(0, "base", name, measured(federation, name, ClientState()))
        for name in federation.test
    ]
    server = federation.settings.strategy.init(federation.server_first)
    return federation.run.begin(server, experts, metrics)


def _select(federation: Federation, name: str) -> list[list[int]]:
    """Choose from the client's own training rows and nothing else."""
    graft, examples = federation.settings.graft, federation.train[name]
    if graft is None:
        return []
    batches = [collate(examples[i : i + 8], federation.pad_id) for i in range(0, len(examples), 8)]
    seed = seed_of(federation.settings.seed, "selection", name)
    return choose_experts(federation.base.model, federation.base.sites, graft, batches, seed)
