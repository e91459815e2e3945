"""Finished runs side by side: one method per row, one client per column, the mean with its interval."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pomona.errors import PomonaError
from pomona.evaluation.intervals import Interval, ratio_bootstrap

BASE = "base (untuned)"


@dataclass(frozen=True)
class FinishedRun:
    """What a run directory tells once it is finished."""

    path: Path
    method: str
    seed: int
    about: Mapping[str, Any] = field(repr=False)
    results: Mapping[str, Any] = field(repr=False)
    answers: Sequence[Mapping[str, Any]] = field(repr=False)
    metrics: Sequence[Mapping[str, Any]] = field(repr=False)
    recipe: str = field(repr=False)

    @property
    def served(self) -> str:
        """The model a client ends up with: its personal one or, without one, the shared one."""
        return "personal" if self.results["personal"] is not None else "shared"


@dataclass(frozen=True)
class Line:
    """One method: each client's figure and their mean with its interval over rows and seeds."""

    method: str
    seeds: tuple[int, ...]
    clients: Mapping[str, float]
    mean: Interval


def load_runs(paths: Sequence[Path]) -> list[FinishedRun]:
    """Read finished run directories; raises `PomonaError` naming one that is none."""
    return [_load(path) for path in paths]


def _load(path: Path) -> FinishedRun:
    if not (path / "run.json").is_file():
        raise PomonaError(f"{path} is no run directory: it holds no run.json")
    if not (path / "results.json").is_file():
        raise PomonaError(f"{path} is not finished; run its command again to go on with it")
    about = _json(path / "run.json")
    return FinishedRun(
        path,
        about["method"],
        about["seed"],
        about,
        _json(path / "results.json"),
        _lines(path / "answers.jsonl"),
        _lines(path / "metrics.jsonl"),
        (path / "recipe.toml").read_text("utf-8"),
    )


def compare(runs: Sequence[FinishedRun], measure: str) -> list[Line]:
    """Return the untuned base and then every method, for "loss" or "rouge_l".

    Runs of one method with different seeds are one line: every row's value is averaged over the
    seeds, and rows are resampled inside each client.
    """
    methods = list(dict.fromkeys(run.method for run in runs))
    groups = {method: [run for run in runs if run.method == method] for method in methods}
    return [
        _line(BASE, runs[:1], "base", measure),
        *(_line(method, group, group[0].served, measure) for method, group in groups.items()),
    ]


def _line(method: str, runs: Sequence[FinishedRun], model: str, measure: str) -> Line:
    seeds = tuple(sorted({run.seed for run in runs}))
    rows = {
        client: ratio_rows(runs, model, client, measure)
        for client in runs[0].results[model]["clients"]
    }
    clients = {name: float(top.sum() / bottom.sum()) for name, (top, bottom) in rows.items()}
    return Line(method, seeds, clients, ratio_bootstrap(list(rows.values())))


def ratio_rows(
    runs: Sequence[FinishedRun], model: str, client: str, measure: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return numerator and denominator per test row [n], each averaged over the runs' seeds.

    A loss is Σ nats / Σ tokens, ROUGE-L a plain mean over the rows that were answered.
    """
    above, below = ("nats", "tokens") if measure == "loss" else ("rouge_l", None)
    own = [[a for a in run.answers if (a["client"], a["model"]) == (client, model)] for run in runs]
    kept = [[a for a in answers if a[above] is not None] for answers in own]
    top = np.mean([[a[above] for a in answers] for answers in kept], axis=0)
    bottom = np.mean([[a[below] if below else 1.0 for a in answers] for answers in kept], axis=0)
    return top, bottom


def table(runs: Sequence[FinishedRun], measure: str) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of a printed comparison."""
    lines = compare(runs, measure)
    clients = list(lines[0].clients)
    digits = 3 if measure == "loss" else 1
    header = ["method", *clients, "mean", "95 % interval", "seeds"]
    rows = [
        [
            line.method,
            *(f"{line.clients[name]:.{digits}f}" for name in clients),
            f"{line.mean.mean:.{digits}f}",
            f"{line.mean.low:.{digits}f} – {line.mean.high:.{digits}f}",
            str(len(line.seeds)) if line.method != BASE else "",
        ]
        for line in lines
    ]
    return header, rows


MEASURES = {
    "loss": "answer loss, nats per token (lower is better)",
    "rouge_l": "ROUGE-L, 0 to 100 (higher is better)",
}


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8"))


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
