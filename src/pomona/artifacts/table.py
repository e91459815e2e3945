"""Finished runs side by side: one method per row, one client per column, the mean with its interval."""

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pomona.errors import PomonaError
from pomona.evaluation.intervals import (
    Comparison,
    Interval,
    Ratio,
    paired_bootstrap,
    ratio_bootstrap,
)
from pomona.files import read_object

BASE = "base"


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
    """Read finished run directories.

    Raises `PomonaError` naming one that is none or damaged, or two that cannot be compared: of
    different models, or of one method and not only of different seeds.
    """
    runs: list[FinishedRun] = []
    for path in paths:
        try:
            runs.append(_load(path))
        except (OSError, KeyError, ValueError) as error:
            raise PomonaError(
                f"{path} is a damaged run ({type(error).__name__}: {error}); restore its files or run "
                "it again in a new folder"
            ) from error
    for i, run in enumerate(runs):
        for other in runs[:i]:
            _check_comparable(other, run)
    return runs


def _check_comparable(a: FinishedRun, b: FinishedRun) -> None:
    ours, theirs = tomllib.loads(a.recipe), tomllib.loads(b.recipe)
    if ours["model"] != theirs["model"]:
        raise PomonaError(
            f"{a.path} and {b.path} are of different models ({ours['model']}, {theirs['model']}); "
            "compare runs of one model"
        )
    if a.method != b.method:
        return
    if a.seed == b.seed:
        raise PomonaError(
            f'{a.path} and {b.path} are both "{a.method}" with seed {a.seed}; give each run once, and '
            "other methods other names"
        )
    differs = sorted(
        key
        for key in {*ours, *theirs} - {"seed", "data"}  # a seed may have clients of its own
        if ours.get(key) != theirs.get(key)
    )
    if differs:
        raise PomonaError(
            f'{a.path} and {b.path} are both called "{a.method}" and differ in {", ".join(differs)}; give '
            "them different names in their recipes"
        )


def _load(path: Path) -> FinishedRun:
    if not (path / "run.json").is_file():
        raise PomonaError(f"{path} is no run directory: it holds no run.json")
    if not (path / "results.json").is_file():
        raise PomonaError(f"{path} is not finished; run its command again to go on with it")
    about, results = read_object(path / "run.json"), read_object(path / "results.json")
    missing = {"base", "shared", "personal", "routing"} - results.keys()
    if missing:
        raise ValueError(f"results.json has no {sorted(missing)[0]}")
    return FinishedRun(
        path,
        about["method"],
        about["seed"],
        about,
        results,
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
    bottom = [np.array([a[below] if below else 1.0 for a in answers]) for answers in kept]
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


def _lines(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    if not lines:
        raise ValueError(f"{path.name} is empty")
    return lines
