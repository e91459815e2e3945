"""When and on how much a federation is evaluated."""

from dataclasses import dataclass
from pathlib import Path

from pomona.errors import PomonaError


@dataclass(frozen=True)
class Evaluation:
    """When and on how much a federation is evaluated.

    Losses every `every` rounds and at the end, on the first `rows` test rows of each client (0: all);
    at the end also ROUGE-L and exact match of greedy answers of up to `new_tokens` tokens on the first
    `answers` rows. `forgetting` is text (a folder of domains, a glob or a file) of which the first
    `windows` windows of `max_length` tokens per domain (0: all) are measured at the end, under every
    model; `speed` times generation with one client's parts on, beside the base. `tasks` are tasks of the LM
    evaluation harness, answered at the end by every model too: the first `limit` questions of each (0:
    all) after `fewshot` examples (None: the task's own number), the local ones from `task_data`.
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
