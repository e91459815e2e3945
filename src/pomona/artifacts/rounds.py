"""What metrics.jsonl tells round by round: losses, drift of routing, openness of gates."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pomona.artifacts.finished import FinishedRun
from pomona.evaluation.experts import load_drift

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
