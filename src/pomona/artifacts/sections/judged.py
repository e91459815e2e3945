"""What a judge said: scores of open-ended answers, from files of `pomona judge --json`."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from pomona.artifacts.finished import FinishedRun
from pomona.artifacts.judgements import JudgedFile, Scores
from pomona.artifacts.page import heading, note, number, span, table
from pomona.artifacts.sections.paired import paired
from pomona.evaluation.intervals import (
    Comparison,
    Interval,
    Ratio,
    paired_bootstrap,
    ratio_bootstrap,
)


@dataclass(frozen=True, eq=False)
class _Group:
    """What one method, or one model, was judged on by one judge: files of its clients and seeds."""

    name: str
    judge: str
    files: Sequence[JudgedFile]

    @property
    def clients(self) -> set[str]:
        """The clients that answered; none where one model serves all."""
        return {file.client for file in self.files if file.client}

    def comparable(self, other: "_Group") -> bool:
        """Whether the same judge heard the same clients, or a model that serves all."""
        clients = self.clients, other.clients
        return self.judge == other.judge and (not all(clients) or clients[0] == clients[1])


def judged(
    files: Sequence[JudgedFile],
    runs: Sequence[FinishedRun] = (),
    baseline: str | None = None,
    clients: Collection[str] | None = None,
) -> str:
    """Return a row per file and criterion, then methods of the runs and models side by side.

    With `clients` only what these have answered, and what serves all; nothing if none of them has.
    """
    shown = [j for j in files if clients is None or j.client is None or j.client in clients]
    if not shown or (clients is not None and not any(j.client for j in shown)):
        return ""
    body = [
        [
            judgement.worn,
            criterion,
            *_interval(score),
            str(judgement.file.unparsable.get(criterion, 0)),
            judgement.file.judge,
            judgement.path.name,
        ]
        for judgement in shown
        for criterion, score in judgement.file.scores.items()
    ]
    header = ["model", "criterion", "mean of 1 to 10", "95 % over prompts", "unparsable", "judge"]
    told = "Bootstrap over prompts. Unparsable: answers the judge gave no score, in no mean."
    parts = [heading("judged answers"), table([*header, "file"], body), note(told)]
    return "".join([*parts, _side_by_side(shown, runs, baseline) if len(shown) > 1 else ""])


def _side_by_side(
    files: Sequence[JudgedFile], runs: Sequence[FinishedRun], baseline: str | None
) -> str:
    """Return the clients of a method together, and the differences of what the same judge scored."""
    body: list[list[str]] = []
    found: list[tuple[str, Comparison]] = []
    for criterion in dict.fromkeys(name for file in files for name in file.file.scores):
        scores = {
            group: _common([file.of(criterion) for file in group.files])
            for group in _groups(files, runs, criterion)
        }
        body += [_row(group, criterion, own) for group, own in scores.items()]
        for a, b in combinations(scores, 2):
            if baseline == a.name:
                a, b = b, a
            both = [prompt for prompt in scores[a] if prompt in scores[b]]
            if both and a.comparable(b) and baseline in (None, b.name):
                compared = paired_bootstrap([_ratio(scores[a], both)], [_ratio(scores[b], both)])
                found.append((f"{a.name} − {b.name}, {criterion}", compared))
    header = ["answered by", "criterion", "judge", "clients", "mean", "95 % over prompts"]
    told = (
        "Clients and seeds of a method together: a prompt's score is the mean, of the prompts that all have a "
        "score for; the worst client's is the mean over its own prompts. Differences: paired bootstrap over "
        "the prompts that both have one for, of the same clients; Holm: corrected for all rows."
    )
    return table([*header, "worst client", "prompts"], body) + paired(found, 2) + note(told)


def _groups(
    files: Sequence[JudgedFile], runs: Sequence[FinishedRun], criterion: str
) -> list[_Group]:
    """Return who answered, by judge; a file without any score by this criterion is left out."""
    found: dict[tuple[str, str], list[JudgedFile]] = {}
    for file in files:
        if file.of(criterion):
            found.setdefault((file.answered_by(runs), file.file.judge), []).append(file)
    return [_Group(name, judge, tuple(own)) for (name, judge), own in found.items()]


def _row(group: _Group, criterion: str, scores: Scores) -> list[str]:
    own: dict[str | None, list[float]] = {}
    for file in group.files:
        own.setdefault(file.client, []).extend(file.of(criterion).values())
    worst = min(float(np.mean(given)) for given in own.values())
    whole = ratio_bootstrap([_ratio(scores, list(scores))]) if scores else None
    return [
        group.name,
        criterion,
        group.judge,
        str(len(group.clients) or "–"),
        *_interval(whole),
        number(worst if len(group.clients) > 1 else None, 2),
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
