"""What was forgotten: tasks of the evaluation harness before and after, the untuned base beside."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pomona.artifacts.finished import FinishedRun
from pomona.artifacts.page import heading, note, number, span, table
from pomona.artifacts.sections.paired import paired
from pomona.artifacts.table import methods_of
from pomona.evaluation.intervals import Comparison, Ratio, paired_bootstrap
from pomona.evaluation.significance import holm

Lines = Sequence[Mapping[str, Any]]
Groups = Mapping[str, Lines]

_HEADER = ["task", "metric", "model", "value", "std. error", "− base", "95 %", "p", "p, Holm"]
_DIGITS = 4


def tasks(runs: Sequence[FinishedRun], baseline: str | None) -> str:
    """Return a row per task, metric and model; of a group of tasks the group alone is shown."""
    groups = {
        method: lines
        for method, group in methods_of(runs).items()
        if (lines := [line for run in group for line in run.tasks])
    }
    if not groups:
        return ""
    every = [line for lines in groups.values() for line in lines]
    asked = dict.fromkeys((line["task"], line["metric"]) for line in every)
    names = {task for task, _ in asked}
    kinds = {
        kind: {method: _of_kind(lines, *kind) for method, lines in groups.items()}
        for kind in asked
        if not any(kind[0].startswith(f"{name}_") for name in names - {kind[0]})
    }
    served = {method: group[0].served for method, group in methods_of(runs).items()}
    versions = ", ".join(dict.fromkeys(line["harness"] for line in every))
    questions = max(line["questions"] for line in every)
    told = (
        f"At most {questions} questions each, LM evaluation harness {versions}. Personal models: the mean over "
        "clients; several seeds: over seeds. The standard error is the harness's, of one model's questions. "
        "Differences: paired bootstrap over the same questions; Holm: corrected for all rows. From "
        "tasks.jsonl, which has the members of a group too."
    )
    cut = max(line["cut"] for line in every)
    if cut:
        told += f" Up to {cut} requests of a model were longer than its context and lost their beginning."
    return (
        heading("what was forgotten: tasks")
        + table([*_HEADER, "lowest client", "questions"], _rows(kinds))
        + note(told)
        + _against(kinds, served, baseline)
    )


def _of_kind(lines: Lines, task: str, metric: str) -> Lines:
    return [line for line in lines if (line["task"], line["metric"]) == (task, metric)]


def _of_model(lines: Lines, model: str) -> Lines:
    return [line for line in lines if line["model"] == model]


def _rows(kinds: Mapping[tuple[str, str], Groups]) -> list[list[str]]:
    """Return the base's row of every task, once, and those of every method's models."""
    found = [
        (kind, method, model, own, None if model == "base" else _compare(own, model, own, "base"))
        for kind, groups in kinds.items()
        for method, own in groups.items()
        for model in ("base", "shared", "personal")
        if _of_model(own, model) and (model != "base" or method == _first_with_base(groups))
    ]
    corrected = iter(holm([compared.p_value for *_, compared in found if compared]))
    rows: list[list[str]] = []
    for kind, method, model, own, compared in found:
        lines = _of_model(own, model)
        value, base = _mean(lines, "value"), _mean(_of_model(own, "base"), "value")
        apart = None if model == "base" or value is None or base is None else value - base
        rows.append(
            [
                *kind,
                model if model == "base" else f"{method}, {model}",
                number(value, _DIGITS),
                number(_mean(lines, "error"), _DIGITS),
                number(apart, _DIGITS, "+"),
                *(_interval_and_p(compared, next(corrected)) if compared else ["–"] * 3),
                number(_lowest(lines), _DIGITS),
                str(lines[0]["questions"]),
            ]
        )
    return rows


def _first_with_base(groups: Groups) -> str | None:
    """The base is the same beside every method, and shown once."""
    return next((method for method, own in groups.items() if _of_model(own, "base")), None)


def _interval_and_p(compared: Comparison, corrected: float) -> list[str]:
    low, high = compared.difference.low, compared.difference.high
    return [span(low, high, _DIGITS, "+"), number(compared.p_value, 4), number(corrected, 4)]


def _against(
    kinds: Mapping[tuple[str, str], Groups], served: Mapping[str, str], baseline: str | None
) -> str:
    """Return every method's difference from the baseline, as their clients are served."""
    if baseline is None:
        return ""
    found = [
        (f"{method} − {baseline}, {task} ({metric})", compared)
        for (task, metric), groups in kinds.items()
        if baseline in groups
        for method, lines in groups.items()
        if method != baseline
        and (compared := _compare(lines, served[method], groups[baseline], served[baseline]))
    ]
    return paired(found, _DIGITS)


def _compare(a: Lines, first: str, b: Lines, second: str) -> Comparison | None:
    """Compare two models on the same questions; None where those are others or were not kept."""
    ours, theirs = (
        _questions(_of_model(lines, model)) for lines, model in ((a, first), (b, second))
    )
    same = {line.get("asked") for line in (*_of_model(a, first), *_of_model(b, second))}
    if ours is None or theirs is None or len(same) > 1:
        return None
    return paired_bootstrap([ours], [theirs])


def _questions(lines: Lines) -> Ratio | None:
    """Return what every question was given, the mean over clients and seeds [n]."""
    every = [line.get("scores", ()) for line in lines]
    if len({len(scores) for scores in every}) != 1 or not every[0]:
        return None
    mean_n = np.mean(np.array(every, dtype=float), axis=0)
    return mean_n, np.ones(len(mean_n))


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
