"""What a judge said: scores of open-ended answers, from files of `pomona judge --json`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pomona.artifacts.page import heading, note, number, span, table
from pomona.evaluation.intervals import Interval
from pomona.files import read_as


@dataclass(frozen=True)
class _Judged:
    model: str
    judge: str
    scores: dict[str, Interval | None]
    unparsable: dict[str, int]
    adapter: str | None = None
    graft: str | None = None
    personal: str | None = None


def judged(files: Sequence[Path]) -> str:
    """Return a row per file and criterion; raises `PomonaError` naming a file that is none of a judge."""
    if not files:
        return ""
    body: list[list[str]] = []
    for path in files:
        found = read_as(path, _Judged)
        parts = (found.model, found.adapter, found.graft, found.personal)
        worn = " + ".join(part for part in parts if part)
        for criterion, score in found.scores.items():
            body.append(
                [
                    worn,
                    criterion,
                    number(score.mean if score else None, 2),
                    span(score.low, score.high, 2) if score else "–",
                    str(found.unparsable.get(criterion, 0)),
                    found.judge,
                    path.name,
                ]
            )
    header = ["model", "criterion", "mean of 1 to 10", "95 % over prompts", "unparsable", "judge"]
    told = "Bootstrap over prompts. Unparsable: answers the judge gave no score, in no mean."
    return heading("judged answers") + table([*header, "file"], body) + note(told)
