"""What differential privacy every private run promises: of what is shared, of single rows."""

from collections.abc import Mapping, Sequence
from typing import Any

from pomona.artifacts.finished import FinishedRun
from pomona.artifacts.page import heading, note, table


def privacy(runs: Sequence[FinishedRun]) -> str:
    """Return ε and δ after the last round per run, or nothing if no run was private."""
    body = [
        _row(run, lines, of)
        for model, of in (("privacy", "a client"), ("dp-sgd", "a row"))
        for run in runs
        if (lines := [line for line in run.metrics if line["model"] == model])
    ]
    if not body:
        return ""
    told = (
        "Of a client: of the shared part only. Of a row: the client with the largest ε, of all it has trained. "
        "The recipe below says how it was accounted for. From metrics.jsonl."
    )
    header = ["method", "seed", "of", "ε", "δ", "noise drawn from"]
    return heading("differential privacy") + table(header, body) + note(told)


def _row(run: FinishedRun, lines: Sequence[Mapping[str, Any]], of: str) -> list[str]:
    last = max(lines, key=lambda line: line["epsilon"])
    secret = all(line["secret"] for line in lines)
    drawn = "a secret" if secret else "the recipe's seed (simulation)"
    return [run.method, str(run.seed), of, f"{last['epsilon']:.3g}", f"{last['delta']:g}", drawn]
