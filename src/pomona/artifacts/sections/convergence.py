"""How losses fall over the rounds."""

from collections.abc import Iterator, Sequence

from pomona.artifacts import curves
from pomona.artifacts.finished import FinishedRun
from pomona.artifacts.page import figure, heading
from pomona.artifacts.rounds import client_series
from pomona.artifacts.table import methods_of


def convergence(runs: Sequence[FinishedRun]) -> str:
    """Return the curves of training and test losses of all runs together."""
    plot = curves.convergence(methods_of(runs))
    told = "Thin: each client (up to ten) of each seed. Thick: their mean. From metrics.jsonl."
    cells = [["method", "seed", "model", "client", "round", "loss"], *_losses(runs)]
    return heading("convergence") + figure(plot, told, cells)


def _losses(runs: Sequence[FinishedRun]) -> Iterator[list[object]]:
    for run in runs:
        for model in ("training", "base", "shared", "personal"):
            for client, series in client_series(run, model).items():
                for round_, loss in series.items():
                    yield [run.method, run.seed, model, client, round_, loss]
