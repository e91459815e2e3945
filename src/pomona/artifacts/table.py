"""Finished runs side by side: one method per row, one client per column, the mean with its interval."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pomona.artifacts.finished import FinishedRun, load_runs
from pomona.artifacts.measures import (
    MEASURES,
    client_rows,
    measured,
    ratio_rows,
    row_keys,
)
from pomona.errors import PomonaError
from pomona.evaluation.intervals import Comparison, Interval, paired_bootstrap, ratio_bootstrap
from pomona.evaluation.significance import holm, seed_comparison, seed_interval

__all__ = [
    "BASE",
    "MEASURES",
    "Difference",
    "FinishedRun",
    "Line",
    "compare",
    "differences",
    "load_runs",
    "measured",
    "methods_of",
    "pairwise",
    "ratio_rows",
    "table",
]

BASE = "base"
Model = Literal["base", "shared", "personal"]


@dataclass(frozen=True)
class Line:
    """One method: each client's figure and their mean with its intervals.

    `mean` has the interval over rows; `over_seeds` is the mean of each seed's mean with the interval
    over seeds, None for fewer than three. `worst` is the worst client's figure and `spread` the
    standard deviation over the clients, all of which are there.
    """

    method: str
    seeds: tuple[int, ...]
    clients: Mapping[str, float]
    mean: Interval
    worst: float
    spread: float
    over_seeds: Interval | None


@dataclass(frozen=True)
class Difference:
    """Two methods on the same test rows: `first` − `second`, over rows and over seeds.

    `corrected` is Holm's p-value over rows among all differences that were asked for together, and
    `corrected_seeds` over seeds; None without three seeds that both methods have.
    """

    first: str
    second: str
    rows: Comparison
    corrected: float
    seeds: Comparison | None
    corrected_seeds: float | None


def methods_of(runs: Sequence[FinishedRun]) -> dict[str, list[FinishedRun]]:
    """Return the runs of every method, by seed: runs that differ in nothing else are one method."""
    names = dict.fromkeys(run.method for run in runs)
    return {
        name: sorted((r for r in runs if r.method == name), key=lambda r: r.seed) for name in names
    }


def compare(runs: Sequence[FinishedRun], measure: str) -> list[Line]:
    """Return the untuned base and then every method, as each client is served by it.

    Runs of one method with different seeds are one line: every row's value is averaged over the
    seeds, and rows are resampled inside each client.
    """
    groups = methods_of(runs)
    first = next(iter(groups.values()))
    return [
        line_of(BASE, first, "base", measure),
        *(line_of(method, group, group[0].served, measure) for method, group in groups.items()),
    ]


def line_of(method: str, runs: Sequence[FinishedRun], model: str, measure: str) -> Line:
    """Return one line of a comparison, of a model that all runs have."""
    how, rows = MEASURES[measure], client_rows(runs, model, measure)
    clients = {name: how.of(own) for name, own in rows.items()}
    figures = list(clients.values())
    return Line(
        method,
        tuple(run.seed for run in runs),
        clients,
        ratio_bootstrap(list(rows.values()), transform=how.transform),
        how.worst(figures),
        float(np.std(figures)),
        None if method == BASE else seed_interval(_per_seed(runs, model, measure)),
    )


def _per_seed(runs: Sequence[FinishedRun], model: str, measure: str) -> list[float]:
    how = MEASURES[measure]
    return [
        float(np.mean([how.of(own) for own in client_rows([run], model, measure).values()]))
        for run in runs
    ]


def differences(
    runs: Sequence[FinishedRun], measure: str, baseline: str | None = None
) -> list[Difference]:
    """Compare every method with a baseline, which may be "base", or without one every two methods.

    Methods that share no test rows are left out. Raises `PomonaError` for a baseline that is not
    there, with the names of those that are.
    """
    groups = methods_of(runs)
    if baseline is not None and baseline not in (BASE, *groups):
        names = ", ".join(f'"{name}"' for name in (BASE, *groups))
        raise PomonaError(f'no run is of the method "{baseline}"; the methods here are {names}')
    names = list(groups)
    pairs = (
        [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
        if baseline is None
        else [(name, baseline) for name in names if name != baseline]
    )
    found = [
        (a, b, *compared)
        for a, b in pairs
        if (compared := _compare(groups[a], groups.get(b, groups[a]), b == BASE, measure))
    ]
    rows = holm([over_rows.p_value for *_, over_rows, _ in found])
    seeded = [i for i, (*_, over_seeds) in enumerate(found) if over_seeds is not None]
    p_seeds = [s.p_value for *_, s in found if s is not None]
    corrected = dict(zip(seeded, holm(p_seeds), strict=True))
    return [
        Difference(a, b, over_rows, rows[i], over_seeds, corrected.get(i))
        for i, (a, b, over_rows, over_seeds) in enumerate(found)
    ]


def pairwise(runs: Sequence[FinishedRun], measure: str) -> list[tuple[str, str, Comparison]]:
    """Compare every two methods on the same test rows; methods measured on other rows are left out."""
    return [(found.first, found.second, found.rows) for found in differences(runs, measure)]


def _compare(
    a: Sequence[FinishedRun], b: Sequence[FinishedRun], to_base: bool, measure: str
) -> tuple[Comparison, Comparison | None] | None:
    """Pair by row, with all seeds where the rows are the same in all, else with those both have."""
    first, second = a[0].served, BASE if to_base else b[0].served
    seeds = {run.seed for run in a} & {run.seed for run in b}
    ours, theirs = ([run for run in group if run.seed in seeds] for group in (a, b))
    over_seeds = seed_comparison(
        _per_seed(ours, first, measure), _per_seed(theirs, second, measure)
    )
    for left, right in ((a, b), (ours, theirs)):
        if left and row_keys(left, first, measure) == row_keys(right, second, measure):
            ours_by, theirs_by = (
                list(client_rows(*which, measure).values())
                for which in ((left, first), (right, second))
            )
            how = MEASURES[measure]
            return paired_bootstrap(ours_by, theirs_by, transform=how.transform), over_seeds
    return None


def table(runs: Sequence[FinishedRun], measure: str) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of a comparison that fits a terminal: one client per row."""
    lines = compare(runs, measure)

    def row(name: str, figures: Sequence[float | None]) -> list[str]:
        digits = MEASURES[measure].digits
        return [name, *("–" if figure is None else f"{figure:.{digits}f}" for figure in figures)]

    rows = [row(name, [line.clients[name] for line in lines]) for name in lines[0].clients]
    rows.append(row("mean", [line.mean.mean for line in lines]))
    rows.append(row("95 % from", [line.mean.low for line in lines]))
    rows.append(row("95 % to", [line.mean.high for line in lines]))
    rows.append(row("worst client", [line.worst for line in lines]))
    rows.append(row("spread", [line.spread for line in lines]))
    if any(len(line.seeds) > 1 for line in lines):
        rows.append(["seeds", *("" if x.method == BASE else str(len(x.seeds)) for x in lines)])
    if any(line.over_seeds for line in lines):
        seeds = [line.over_seeds for line in lines]
        rows.append(row("95 % over seeds from", [x.low if x else None for x in seeds]))
        rows.append(row("95 % over seeds to", [x.high if x else None for x in seeds]))
    return ["client", *(line.method for line in lines)], rows
