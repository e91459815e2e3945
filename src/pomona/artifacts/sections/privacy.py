"""What the shared part of every private run has cost."""

from collections.abc import Sequence

from pomona.artifacts.finished import FinishedRun
from pomona.artifacts.page import heading, note, table


def privacy(runs: Sequence[FinishedRun]) -> str:
    """Return ε and δ after the last round per run, or nothing if no run was private."""
    spent = [(r, [m for m in r.metrics if m["model"] == "privacy"]) for r in runs]
    body = [
        [
            run.method,
            str(run.seed),
            f"{lines[-1]['epsilon']:.3g}",
            f"{lines[-1]['delta']:g}",
            "a secret"
            if all(line["secret"] for line in lines)
            else "the recipe's seed (simulation)",
        ]
        for run, lines in spent
        if lines
    ]
    if not body:
        return ""
    told = "Of the shared part only; the recipe below says how it was accounted for. From metrics.jsonl."
    header = ["method", "seed", "ε", "δ", "noise drawn from"]
    return heading("differential privacy") + table(header, body) + note(told)
