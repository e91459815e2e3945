"""Before the first round: every client chooses the experts that its grafts grow from."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, overload

from pomona.artifacts.checkpoint import Snapshot
from pomona.data.examples import Batch, Example, collate
from pomona.federation.cohort import FrozenBase
from pomona.federation.graft import choose_experts
from pomona.federation.measure import Models
from pomona.federation.update import ClientState
from pomona.pipelines.federate.evaluate import loss_line, measured
from pomona.pipelines.federate.prepare import Federation
from pomona.seeds import seed_of

_ROWS = 8


def begin(federation: Federation) -> Snapshot:
    """Choose every client's experts, measure the untuned base."""
    experts: dict[str, list[list[int]]] = {}
    lines: list[dict[str, Any]] = []
    for done, names in federation.cohorts(list(federation.train)):
        federation.progress("grafting", done, len(federation.train))
        chosen = federation.replicas.map(lambda base, some: _select(federation, base, some), names)
        experts |= dict(zip(names, chosen, strict=True))
    federation.progress("grafting", len(experts), len(experts))
    for _, names in federation.cohorts(list(federation.test)):
        found = measured(federation, Models("base", names, [ClientState()]))
        lines += [loss_line(0, "base", *own) for own in zip(names, found, strict=True)]
    server = federation.settings.strategy.init(federation.server_first)
    return federation.run.begin(server, experts, lines)


def _select(
    federation: Federation, base: FrozenBase, names: Sequence[str]
) -> list[list[list[int]]]:
    """Choose for every client from its own training rows and nothing else."""
    graft = federation.settings.graft
    if graft is None:
        return [[] for _ in names]
    seeds = [seed_of(federation.settings.seed, "selection", name) for name in names]
    batches = [_Batches(federation.train[name], federation.pad_id) for name in names]
    return choose_experts(base.model, base.sites, graft, batches, seeds)


@dataclass(frozen=True, eq=False)
class _Batches(Sequence[Batch]):
    """Rows by eights, collated when they are asked for: most rules look at the first ones, or at none."""

    examples: Sequence[Example]
    pad_id: int

    def __len__(self) -> int:
        return ceil(len(self.examples) / _ROWS)

    @overload
    def __getitem__(self, place: int) -> Batch: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Batch]: ...
    def __getitem__(self, place: int | slice) -> Batch | Sequence[Batch]:
        if isinstance(place, slice):
            return [self[k] for k in range(len(self))[place]]
        start = range(len(self))[place] * _ROWS
        return collate(self.examples[start : start + _ROWS], self.pad_id)
