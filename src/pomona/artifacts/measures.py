"""What is compared: the measures of an answer, and the test rows of finished runs behind them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pomona.artifacts.finished import FinishedRun
from pomona.evaluation.intervals import Ratio, Transform


@dataclass(frozen=True)
class Measure:
    """One figure per client: Σ `above` / Σ `below` over its rows (`below` None: a plain mean).

    `digits` are those worth printing, `transform` what becomes of the ratio.
    """

    title: str
    lower: bool
    digits: int
    above: str
    below: str | None = None
    transform: Transform | None = None

    def __str__(self) -> str:
        """Return the title and which way is better."""
        return f"{self.title} ({'lower' if self.lower else 'higher'} is better)"

    def worst(self, figures: Sequence[float]) -> float:
        """Return the figure of the client that is served worst."""
        return max(figures) if self.lower else min(figures)

    def of(self, rows: Ratio) -> float:
        """Return a client's figure."""
        ratio = np.array([rows[0].sum() / rows[1].sum()])
        return float(ratio[0] if self.transform is None else self.transform(ratio)[0])


def _exponential(nats: NDArray[np.float64]) -> NDArray[np.float64]:
    with np.errstate(over="ignore"):  # infinite where no float holds it
        return np.exp(nats)


MEASURES: dict[str, Measure] = {
    "loss": Measure("answer loss, nats per token", True, 3, "nats", "tokens"),
    "perplexity": Measure("perplexity of answers", True, 2, "nats", "tokens", _exponential),
    "rouge_l": Measure("ROUGE-L, 0 to 100", False, 1, "rouge_l"),
    "exact_match": Measure("exact match, percent of answers", False, 1, "exact_match"),
}


def measured(runs: Sequence[FinishedRun]) -> list[str]:
    """Return the measures that every run has rows of: a run may have been told to answer none."""
    return [
        name
        for name, measure in MEASURES.items()
        if all(any(line[measure.above] is not None for line in run.answers) for run in runs)
    ]


def ratio_rows(runs: Sequence[FinishedRun], model: str, client: str, measure: str) -> Ratio:
    """Return numerator and denominator per test row [n].

    Where all seeds were tested on the same rows, a row's value is averaged over them; where a seed
    dealt other rows (Dirichlet), the rows of all seeds stand side by side.
    """
    above, below = MEASURES[measure].above, MEASURES[measure].below
    kept = [_rows(run, model, client, above) for run in runs]
    top = [np.array([a[above] for a in rows], dtype=float) for rows in kept]
    bottom = [np.array([a[below] if below else 1 for a in rows], dtype=float) for rows in kept]
    keys = {_key(run, client, rows) for run, rows in zip(runs, kept, strict=True)}
    if len(keys) == 1:
        return np.mean(top, axis=0), np.mean(bottom, axis=0)
    return np.concatenate(top), np.concatenate(bottom)


def client_rows(runs: Sequence[FinishedRun], model: str, measure: str) -> dict[str, Ratio]:
    """Return every client's rows."""
    clients = runs[0].results["base"]["clients"]
    return {client: ratio_rows(runs, model, client, measure) for client in clients}


def row_keys(runs: Sequence[FinishedRun], model: str, measure: str) -> list[object]:
    """Return what tells test rows apart, client by client, as `ratio_rows` lines them up."""
    above = MEASURES[measure].above
    keys: list[object] = []
    for client in runs[0].results["base"]["clients"]:
        own = [_key(run, client, _rows(run, model, client, above)) for run in runs]
        keys.append(own[:1] if len(set(own)) == 1 else own)
    return keys


def _rows(run: FinishedRun, model: str, client: str, above: str) -> list[dict[str, object]]:
    return [
        dict(a)
        for a in run.answers
        if (a["client"], a["model"]) == (client, model) and a[above] is not None
    ]


def _key(run: FinishedRun, client: str, rows: Sequence[dict[str, object]]) -> tuple[object, ...]:
    """Tell rows apart by their content and by what of their answers was measured."""
    return run.test_rows.get(client), *((row["row"], row["tokens"]) for row in rows)
