"""What was forgotten: tasks of the evaluation harness before and after, the untuned base beside."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pomona.artifacts.finished import FinishedRun
from pomona.artifacts.page import heading, note, number, table
from pomona.artifacts.table import methods_of

Lines = Sequence[Mapping[str, Any]]

_HEADER = ["task", "metric", "model", "value", "std. error", "− base", "lowest client"]
_DIGITS = 4


def tasks(runs: Sequence[FinishedRun]) -> str:
    """Return a row per task, metric and model; of a group of tasks the group alone is shown."""
    groups = {
        method: lines
        for method, group in methods_of(runs).items()
        if (lines := [line for run in group for line in run.tasks])
    }
    if not groups:
        return ""
    every = [line for lines in groups.values() for line in lines]
    kinds = dict.fromkeys((line["task"], line["metric"]) for line in every)
    names = {task for task, _ in kinds}
    body = [
        row
        for task, metric in kinds
        if not any(task.startswith(f"{name}_") for name in names - {task})
        for row in _rows(groups, task, metric)
    ]
    versions = ", ".join(dict.fromkeys(line["harness"] for line in every))
    questions = max(line["questions"] for line in every)
    told = (
        f"At most {questions} questions each, LM evaluation harness {versions}. Personal models: the mean over "
        "clients; several seeds: over seeds. The standard error is the harness's, of one model's questions; "
        "models answer the same questions, so a difference is surer than two such errors say. From "
        "tasks.jsonl, which has the members of a group too."
    )
    cut = max(line["cut"] for line in every)
    if cut:
        told += f" Up to {cut} requests of a model were longer than its context and lost their beginning."
    return heading("what was forgotten: tasks") + table([*_HEADER, "questions"], body) + note(told)


def _rows(groups: Mapping[str, Lines], task: str, metric: str) -> list[list[str]]:
    """Return the base's row, once, and those of every method's models."""
    rows: list[list[str]] = []
    for method, lines in groups.items():
        own = [line for line in lines if (line["task"], line["metric"]) == (task, metric)]
        base = _mean([line for line in own if line["model"] == "base"], "value")
        for model in ("base", "shared", "personal"):
            found = [line for line in own if line["model"] == model]
            if not found or (model == "base" and rows):
                continue
            value = _mean(found, "value")
            rows.append(
                [
                    task,
                    metric,
                    model if model == "base" else f"{method}, {model}",
                    number(value, _DIGITS),
                    number(_mean(found, "error"), _DIGITS),
                    "–"
                    if model == "base" or value is None or base is None
                    else number(value - base, _DIGITS, "+"),
                    number(_lowest(found), _DIGITS),
                    str(found[0]["questions"]),
                ]
            )
    return rows


def _mean(lines: Lines, key: str) -> float | None:
    known = [line[key] for line in lines if line[key] is not None]
    return float(np.mean(known)) if known else None


def _lowest(lines: Lines) -> float | None:
    """Return the lowest value of a client, each the mean over its seeds; None for what all share."""
    clients = dict.fromkeys(line["client"] for line in lines if line["client"] is not None)
    values = [
        _mean([line for line in lines if line["client"] == name], "value") for name in clients
    ]
    return min((value for value in values if value is not None), default=None)
