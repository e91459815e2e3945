"""How losses fall over the rounds."""

from collections.abc import Sequence

from pomona.artifacts import curves
from pomona.artifacts.finished import FinishedRun
from pomona.artifacts.page import figure, heading
from pomona.artifacts.table import methods_of


def convergence(runs: Sequence[FinishedRun]) -> str:
    """Return the curves of training and test losses of all runs together."""
    plot = curves.convergence(methods_of(runs))
    told = "Thin: each client (up to ten) of each seed. Thick: their mean. From metrics.jsonl."
    return heading("convergence") + figure(plot, told)
