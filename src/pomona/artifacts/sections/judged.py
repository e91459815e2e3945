"""What a judge said: scores of open-ended answers, from files of `pomona judge --json`."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import numpy as np

from pomona.artifacts.page import heading, note, number, span, table
from pomona.artifacts.sections.paired import paired
from pomona.evaluation.intervals import (
    Comparison,
    Interval,
    Ratio,
    paired_bootstrap,
    ratio_bootstrap,
)
from pomona.files import read_as

Scores = dict[str, float]
"""The score of every prompt that was given one."""


@dataclass(frozen=True)
class _Answer:
    prompt: str
    scores: dict[str, int | None]


@dataclass(frozen=True)
class _File:
    model: str
    judge: str
    scores: dict[str, Interval | None]
    unparsable: dict[str, int]
    adapter: str | None = None
    graft: str | None = None
    personal: str | None = None
    answers: list[_Answer] = field(default_factory=list[_Answer])


@dataclass(frozen=True)
class Judgement:
    """A file of `pomona judge --json`: who answered, and what the judge gave each answer."""

    path: Path
    file: _File = field(repr=False)

    @property
    def worn(self) -> str:
        """What answered: the model and the parts of a client."""
        file = self.file
        return " + ".join(p for p in (file.model, file.adapter, file.graft, file.personal) if p)

    @property
    def place(self) -> tuple[str, str | None]:
        """The run whose client answered and the client's name; what answered, and None, without a client."""
        for part in (self.file.graft, self.file.personal, self.file.adapter):
            folders = Path(part or "").parts
            if folders[-3:-2] == ("clients",):  # RUN/clients/NAME/graft, as a run publishes it
                return str(Path(*folders[:-3])), folders[-2]
        return self.worn, None

    def of(self, criterion: str) -> Scores:
        """Return the score of every prompt that was given one."""
        given = ((a.prompt, a.scores.get(criterion)) for a in self.file.answers)
        return {prompt: float(score) for prompt, score in given if score is not None}


def read_judgements(paths: Sequence[Path]) -> list[Judgement]:
    """Read files of a judge; raises `PomonaError` naming one that is none."""
    return [Judgement(path, read_as(path, _File)) for path in paths]


def judged(judgements: Sequence[Judgement], clients: Collection[str] | None = None) -> str:
    """Return a row per file and criterion, then clients of a run together, and who is scored better.

    With `clients`, only what these have answered.
    """
    shown = [j for j in judgements if clients is None or j.place[1] in clients]
    if not shown:
        return ""
    body: list[list[str]] = []
    for judgement in shown:
        file = judgement.file
        for criterion, score in file.scores.items():
            body.append(
                [
                    judgement.worn,
                    criterion,
                    *_interval(score),
                    str(file.unparsable.get(criterion, 0)),
                    file.judge,
                    judgement.path.name,
                ]
            )
    header = ["model", "criterion", "mean of 1 to 10", "95 % over prompts", "unparsable", "judge"]
    told = "Bootstrap over prompts. Unparsable: answers the judge gave no score, in no mean."
    parts = [heading("judged answers"), table([*header, "file"], body), note(told)]
    return "".join([*parts, _together(shown)])


def _together(shown: Sequence[Judgement]) -> str:
    """Return the clients of a run together, and the differences of what the same judge scored."""
    if len(shown) < 2:
        return ""
    groups: dict[tuple[str, str], list[Judgement]] = {}
    for judgement in shown:
        groups.setdefault((judgement.place[0], judgement.file.judge), []).append(judgement)
    body: list[list[str]] = []
    found: list[tuple[str, Comparison]] = []
    for criterion in dict.fromkeys(name for j in shown for name in j.file.scores):
        scores = {key: _common([j.of(criterion) for j in group]) for key, group in groups.items()}
        body += [
            [key[0], criterion, key[1], *_together_cells(group, criterion, scores[key])]
            for key, group in groups.items()
        ]
        for a, b in combinations(groups, 2):
            both = [prompt for prompt in scores[a] if prompt in scores[b]]
            if a[1] == b[1] and both:
                compared = paired_bootstrap([_ratio(scores[a], both)], [_ratio(scores[b], both)])
                found.append((f"{a[0]} − {b[0]}, {criterion}", compared))
    header = ["answered by", "criterion", "judge", "clients", "mean", "95 % over prompts"]
    told = (
        "The clients of a run together: a prompt's score is their mean, of the prompts that all have a score "
        "for. Differences: paired bootstrap over the prompts that both have one for; Holm: corrected for all "
        "rows."
    )
    return table([*header, "worst client", "prompts"], body) + paired(found, 2) + note(told)


def _together_cells(group: Sequence[Judgement], criterion: str, scores: Scores) -> list[str]:
    whole = ratio_bootstrap([_ratio(scores, list(scores))]) if scores else None
    means = [float(np.mean(list(own.values()))) for j in group if (own := j.of(criterion))]
    clients = sum(j.place[1] is not None for j in group)
    return [
        str(clients) if clients else "–",
        *_interval(whole),
        number(min(means) if clients > 1 and means else None, 2),
        str(len(scores)),
    ]


def _common(scores: Sequence[Scores]) -> Scores:
    """Return the mean score of every prompt that all have been scored on."""
    prompts = [prompt for prompt in scores[0] if all(prompt in own for own in scores)]
    return {prompt: float(np.mean([own[prompt] for own in scores])) for prompt in prompts}


def _ratio(scores: Scores, prompts: Sequence[str]) -> Ratio:
    return np.array([scores[prompt] for prompt in prompts]), np.ones(len(prompts))


def _interval(score: Interval | None) -> list[str]:
    if score is None:
        return ["–", "–"]
    return [number(score.mean, 2), span(score.low, score.high, 2)]
