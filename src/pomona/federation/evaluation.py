"""When and on how much a federation is evaluated."""

from dataclasses import dataclass
from pathlib import Path

from pomona.errors import PomonaError


@dataclass(frozen=True)
class Evaluation:
    """When and on how much a federation is evaluated.

    Attributes:
        every: Rounds between evaluations; there is one at the end too.
        rows: Test rows of each client for the loss, the first ones; 0: all.
        answers: Rows that are answered greedily at the end, for ROUGE-L and exact match.
        new_tokens: Longest such answer in tokens.
        batch: Rows per batch.
        forgetting: Text (a folder of domains, a glob or a file) measured at the end under the base, the
            shared and every personal model.
        windows: Its windows of `max_length` tokens per domain; 0: all.
        speed: Time generation with one client's parts on, beside the base.
        tasks: Tasks of the LM evaluation harness, by name or YAML file, answered at the end by the same
            models. A file is looked for where the command runs. Needs the extra `eval`.
        task_data: What `mmlu` (its folder) or `multiple_choice` (a file of questions) reads; without it
            `mmlu` is the harness's own.
        fewshot: Examples before a question; without it the task's own number.
        limit: Questions of every task, the first ones; 0: all.
    """

    every: int = 5
    rows: int = 64
    answers: int = 32
    new_tokens: int = 64
    batch: int = 32
    forgetting: Path | None = None
    windows: int = 16
    speed: bool = False
    tasks: tuple[str, ...] = ()
    task_data: Path | None = None
    fewshot: int | None = None
    limit: int = 64

    def __post_init__(self) -> None:
        for name in ("every", "new_tokens", "batch"):
            if getattr(self, name) < 1:
                raise PomonaError(
                    f"evaluation {name} {getattr(self, name)} is not positive; use 1 or more"
                )
        for name in ("rows", "answers", "windows", "limit", "fewshot"):
            if (getattr(self, name) or 0) < 0:
                raise PomonaError(
                    f"evaluation {name} {getattr(self, name)} is negative; use 0 or more"
                )
        if not self.tasks and (self.task_data is not None or self.fewshot is not None):
            raise PomonaError(
                "evaluation task_data and fewshot are for tasks; name some, or leave them out"
            )
