"""Finished runs side by side: one method per row, one client per column, the mean with its interval."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pomona.artifacts.finished import FinishedRun, load_runs
from pomona.evaluation.intervals import (
    Comparison,
    Interval,
    Ratio,
    paired_bootstrap,
    ratio_bootstrap,
)

__all__ = ["FinishedRun", "compare", "load_runs", "pairwise", "ratio_rows", "table"]

BASE = "base"


@dataclass(frozen=True)
class Line:
    """One method: each client's figure and their mean with its interval over rows and seeds."""

    method: str
    seeds: tuple[int, ...]
    clients: Mapping[str, float]
    mean: Interval


def compare(runs: Sequence[FinishedRun], measure: str) -> list[Line]:
    """Return the untuned base and then every method, for "loss" or "rouge_l".

    Runs of one method with different seeds are one line: every row's value is averaged over the
    seeds, and rows are resampled inside each client.
    """
    methods = list(dict.fromkeys(run.method for run in runs))
    groups = {method: [run for run in runs if run.method == method] for method in methods}
    return [
        _line(BASE, groups[methods[0]], "base", measure),
        *(_line(method, group, group[0].served, measure) for method, group in groups.items()),
    ]


def _line(method: str, runs: Sequence[FinishedRun], model: str, measure: str) -> Line:
    seeds = tuple(sorted({run.seed for run in runs}))
    rows = _rows(runs, model, measure)
    clients = {name: float(top.sum() / bottom.sum()) for name, (top, bottom) in rows.items()}
    return Line(method, seeds, clients, ratio_bootstrap(list(rows.values())))


def _rows(runs: Sequence[FinishedRun], model: str | None, measure: str) -> dict[str, Ratio]:
    """Return every client's rows for a model, or for the one each client is served by."""
    served = model or runs[0].served
    clients = runs[0].results[served]["clients"]
    return {client: ratio_rows(runs, served, client, measure) for client in clients}


def ratio_rows(runs: Sequence[FinishedRun], model: str, client: str, measure: str) -> Ratio:
    """Return numerator and denominator per test row [n].

    A loss is Σ nats / Σ tokens, ROUGE-L a plain mean over the rows that were answered. Where all seeds
    were tested on the same rows, a row's value is averaged over them; where a seed dealt other rows
    (Dirichlet), the rows of all seeds stand side by side.
    """
    above, below = ("nats", "tokens") if measure == "loss" else ("rouge_l", None)
    own = [[a for a in run.answers if (a["client"], a["model"]) == (client, model)] for run in runs]
    kept = [[a for a in answers if a[above] is not None] for answers in own]
    top = [np.array([a[above] for a in answers]) for answers in kept]
    bottom = [np.array([float(a[below]) if below else 1.0 for a in answers]) for answers in kept]
    same = len({tuple((a["row"], a["tokens"]) for a in answers) for answers in kept}) == 1
    if same:
        return np.mean(top, axis=0), np.mean(bottom, axis=0)
    return np.concatenate(top), np.concatenate(bottom)


def pairwise(runs: Sequence[FinishedRun], measure: str) -> list[tuple[str, str, Comparison]]:
    """Compare every two methods on the same test rows; methods measured on other rows are left out."""
    methods = list(dict.fromkeys(run.method for run in runs))
    rows = {m: _rows([r for r in runs if r.method == m], None, measure) for m in methods}
    return [
        (a, b, paired_bootstrap(list(rows[a].values()), list(rows[b].values())))
        for i, a in enumerate(methods)
        for b in methods[i + 1 :]
        if all(len(rows[a][c][0]) == len(rows[b][c][0]) for c in rows[a])
    ]


def table(runs: Sequence[FinishedRun], measure: str) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of a comparison that fits a terminal: one client per row."""
    lines = compare(runs, measure)
    digits = 3 if measure == "loss" else 1
    rows = [
        [name, *(f"{line.clients[name]:.{digits}f}" for line in lines)] for name in lines[0].clients
    ]
    rows.append(["mean", *(f"{line.mean.mean:.{digits}f}" for line in lines)])
    rows.append(["95 % from", *(f"{line.mean.low:.{digits}f}" for line in lines)])
    rows.append(["95 % to", *(f"{line.mean.high:.{digits}f}" for line in lines)])
    if any(len(line.seeds) > 1 for line in lines):
        rows.append(["seeds", *("" if x.method == BASE else str(len(x.seeds)) for x in lines)])
    return ["client", *(line.method for line in lines)], rows


MEASURES = {
    "loss": "answer loss, nats per token (lower is better)",
    "rouge_l": "ROUGE-L, 0 to 100 (higher is better)",
}
