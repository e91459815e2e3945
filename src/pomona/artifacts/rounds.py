"""What metrics.jsonl tells round by round: losses, drift of routing, openness of gates."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pomona.artifacts.finished import FinishedRun
from pomona.evaluation.experts import ExpertLoad, expert_load, load_drift

Line = Mapping[str, Any]
Series = dict[int, float]


def client_series(run: FinishedRun, model: str) -> dict[str, Series]:
    """Return every client's loss by round: of the "training", or of a model on its test rows."""
    value: Callable[[Line], float] = (
        (lambda line: float(np.mean(line["losses"])))
        if model == "training"
        else (lambda line: line["loss"])
    )
    series: dict[str, Series] = {}
    for line in _lines(run, model):
        series.setdefault(line["client"], {})[line["round"]] = value(line)
    return series


def mean_series(series: Sequence[Series]) -> Series:
    """Return the mean of every round that any of the series has."""
    rounds = sorted({round_ for one in series for round_ in one})
    return {r: float(np.mean([one[r] for one in series if r in one])) for r in rounds}


def drift_by_round(runs: Sequence[FinishedRun]) -> dict[int, NDArray[np.float64]]:
    """Return the drift of the served model's expert load from the base's per layer [L], by round.

    The mean over clients and seeds; empty where routing was not recorded.
    """
    found: dict[int, list[NDArray[np.float64]]] = {}
    for run in runs:
        base = {line["client"]: _counts(line) for line in _lines(run, "base") if "counts" in line}
        for line in _lines(run, run.served):
            if "counts" in line and line["client"] in base:
                drift_L = load_drift(_counts(line), base[line["client"]]).numpy()
                found.setdefault(line["round"], []).append(drift_L)
    return {round_: np.mean(drifts, axis=0) for round_, drifts in sorted(found.items())}


def entropy_by_round(runs: Sequence[FinishedRun]) -> dict[int, NDArray[np.float64]]:
    """Return the entropy of the served model's expert load per layer [L], by round, the mean over seeds.

    Round 0 is the base. The load is that of all clients together; empty where routing was not recorded.
    """
    found: dict[int, list[NDArray[np.float64]]] = {}
    for run in runs:
        rounds: dict[int, list[torch.Tensor]] = {}
        experts = _experts_of(run)
        for line in (*_lines(run, "base"), *_lines(run, run.served)) if experts else ():
            if "counts" in line:
                rounds.setdefault(line["round"], []).append(_counts(line))
        for round_, counts in rounds.items():
            load = expert_load(torch.stack(counts).sum(0), experts)
            found.setdefault(round_, []).append(load.entropy_L.numpy())
    return {round_: np.mean(every, axis=0) for round_, every in sorted(found.items())}


def load_by_client(run: FinishedRun, model: str) -> dict[str, ExpertLoad]:
    """Return what the experts were given of every client's test rows when they were last measured."""
    experts = _experts_of(run)
    last = _last_counts(run, model) if experts else {}
    return {name: expert_load(counts_LE, experts) for name, counts_LE in last.items()}


def drift_by_client(runs: Sequence[FinishedRun]) -> dict[str, NDArray[np.float64]]:
    """Return every client's last drift of expert load from the base's per layer [L], the mean over seeds."""
    found: dict[str, list[NDArray[np.float64]]] = {}
    for run in runs:
        base, last = (_last_counts(run, model) for model in ("base", run.served))
        for name in base.keys() & last.keys():
            found.setdefault(name, []).append(load_drift(last[name], base[name]).numpy())
    return {
        name: np.mean(found[name], axis=0)
        for name in runs[0].results["base"]["clients"]
        if name in found
    }


def _last_counts(run: FinishedRun, model: str) -> dict[str, torch.Tensor]:
    return {line["client"]: _counts(line) for line in _lines(run, model) if "counts" in line}


def _experts_of(run: FinishedRun) -> list[int]:
    """Return the number of experts of every MoE layer; empty where routing was not recorded."""
    return next(
        (own["experts"] for own in run.results["routing"].values() if own.get("experts")), []
    )


def openness_by_round(runs: Sequence[FinishedRun]) -> dict[int, NDArray[np.float64]]:
    """Return the mean openness of the gates over clients and seeds per layer [L], by round."""
    found: dict[int, list[list[float]]] = {}
    for run in runs:
        for line in _lines(run, "personal"):
            if "openness" in line:
                found.setdefault(line["round"], []).append(line["openness"])
    return {round_: np.mean(gates, axis=0) for round_, gates in sorted(found.items())}


def _lines(run: FinishedRun, model: str) -> list[Line]:
    return [line for line in run.metrics if line["model"] == model]


def _counts(line: Line) -> torch.Tensor:
    return torch.tensor(line["counts"])
