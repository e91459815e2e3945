"""Judge: what a judge thinks of a model's, or a client's personal model's, open-ended answers."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pomona.artifacts.origin import prompt_for
from pomona.artifacts.personal import PersonalModel, open_personal
from pomona.data.examples import encode_prompt
from pomona.data.prompts import read_prompts
from pomona.data.row import Row
from pomona.errors import PomonaError
from pomona.evaluation.answers import greedy_answers
from pomona.evaluation.intervals import Interval, ratio_bootstrap
from pomona.evaluation.judge import CRITERIA, Judge, open_bench
from pomona.models.loading import context_length, load_tokenizer
from pomona.progress import Progress, silent


@dataclass(frozen=True)
class Judged:
    """One answer with what the judge said of it, by criterion; a score is None if none was given."""

    prompt: str
    answer: str
    scores: dict[str, int | None]
    replies: dict[str, str] = field(repr=False)


@dataclass(frozen=True)
class Judgement:
    """All answers, and by criterion the mean score with its bootstrap interval over prompts.

    `unparsable` counts the answers without a score; they are in no mean. A criterion without any score
    has none.
    """

    answers: list[Judged] = field(repr=False)
    scores: dict[str, Interval | None]
    unparsable: dict[str, int]


def judge(
    personal: PersonalModel,
    prompts: Path,
    by: Judge,
    template: str | None = None,
    limit: int = 0,
    new_tokens: int = 256,
    progress: Progress = silent,
    note: Callable[[str], None] = lambda told: None,
) -> Judgement:
    """Have a model answer prompts greedily, and every answer judged by every criterion.

    `limit` 0 takes all prompts. Only prompts and answers are sent to the judge. Raises `PomonaError` for
    prompts that cannot be read, for numbers that do not fit, and for a judge that cannot be asked.
    """
    if limit < 0 or new_tokens < 1:
        raise PomonaError("limit must not be below 0 and new tokens not below 1")
    asked = read_prompts(prompts)[: limit or None]
    with open_bench(by) as bench:
        answers = _answers(personal, asked, template, new_tokens, progress, note)
        found: list[Judged] = []
        for done, (prompt, answer) in enumerate(zip(asked, answers, strict=True)):
            progress("judging", done, len(asked))
            verdicts = {name: bench.verdict(prompt, answer, name) for name in CRITERIA}
            scores = {name: verdict.score for name, verdict in verdicts.items()}
            replies = {name: verdict.reply for name, verdict in verdicts.items()}
            found.append(Judged(prompt, answer, scores, replies))
        progress("judging", len(asked), len(asked))
    given = {name: [s for each in found if (s := each.scores[name])] for name in CRITERIA}
    return Judgement(
        found,
        {name: _interval(scores) for name, scores in given.items()},
        {name: len(found) - len(scores) for name, scores in given.items()},
    )


def _answers(
    personal: PersonalModel,
    prompts: list[str],
    template: str | None,
    new_tokens: int,
    progress: Progress,
    note: Callable[[str], None],
) -> list[str]:
    form = prompt_for(template, personal.parts, note)
    base, state = open_personal(personal)
    tokenizer = load_tokenizer(personal.source)
    room = context_length(base.model) - new_tokens
    if room < 1:
        raise PomonaError(
            f"new tokens {new_tokens} leave no room for a prompt in the context of {personal.source}; "
            "use fewer"
        )
    encoded = [encode_prompt(Row(p, "", ""), form, tokenizer, room) for p in prompts]
    progress("answering", 0, len(prompts))
    with base.attach_one(state):
        answers = greedy_answers(base.model, tokenizer, encoded, new_tokens)
    progress("answering", len(prompts), len(prompts))
    return answers


def _interval(scores: list[int]) -> Interval | None:
    if not scores:
        return None
    return ratio_bootstrap([(np.array(scores, dtype=float), np.ones(len(scores)))])
