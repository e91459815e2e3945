"""Tasks of the LM evaluation harness: the wording of our own (YAML beside), what any of them gave."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType

from pomona.errors import PomonaError

LOCAL = ("mmlu", "multiple_choice")
"""The tasks that read local files."""


def installed_harness() -> ModuleType:
    """Return `pomona.evaluation.harness`; raises `PomonaError` when the `eval` extra is not installed."""
    try:
        from pomona.evaluation import harness
    except ModuleNotFoundError as error:
        raise PomonaError(
            f"tasks need the LM evaluation harness ({error.name} is not installed); "
            "run pip install 'pomona[eval]'"
        ) from error
    return harness


@dataclass(frozen=True)
class TaskFigures:
    """A task's metrics with their standard errors (None where it has none), and what they are of.

    `fewshot` is None for a group whose members differ. `scores` has what every question was given, in the
    questions' order, of those metrics that are its mean; `asked` is the digest of all prompts.
    """

    metrics: Mapping[str, float]
    errors: Mapping[str, float | None]
    questions: int
    fewshot: int | None
    scores: Mapping[str, Sequence[float]] = field(
        default_factory=dict[str, list[float]], repr=False
    )
    asked: str = ""


@dataclass(frozen=True)
class TaskResults:
    """Every task's figures, a group before its members.

    `cut` counts the requests that were longer than the model's context and lost their beginning;
    `harness` is the harness's version.
    """

    tasks: Mapping[str, TaskFigures]
    cut: int
    harness: str
