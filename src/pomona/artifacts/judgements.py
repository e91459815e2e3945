"""Files of `pomona judge --json`: who answered, and how every answer was scored."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pomona.artifacts.finished import FinishedRun
from pomona.artifacts.table import BASE
from pomona.evaluation.intervals import Interval
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
class JudgedFile:
    """A file of `pomona judge --json`: who answered, and what the judge gave each answer."""

    path: Path
    file: _File = field(repr=False)

    @property
    def worn(self) -> str:
        """What answered: the model and the parts of a client."""
        file = self.file
        return " + ".join(p for p in (file.model, file.adapter, file.graft, file.personal) if p)

    @property
    def client(self) -> str | None:
        """The client that answered; None where the model or what all share did."""
        return next((name for name in (_client(part) for part in self._parts) if name), None)

    def answered_by(self, runs: Sequence[FinishedRun]) -> str:
        """Return the method of the run whose parts answered, "base" for its model, else what answered."""
        if not self._parts:
            known = {Path(run.model).resolve() for run in runs}
            return BASE if Path(self.file.model).resolve() in known else self.worn
        deep = 3 if self.client else 1  # RUN/clients/NAME/graft, RUN/shared
        folder = next(p for p in self._parts if (_client(p) is not None) == (deep == 3))
        place = folder.resolve().parents[deep - 1]
        method = next((run.method for run in runs if run.path.resolve() == place), None)
        if method is None:
            return str(Path(*folder.parts[:-deep])) if self.client else self.worn
        return method if self.client else f"{method}, shared"

    def of(self, criterion: str) -> Scores:
        """Return the score of every prompt that was given one."""
        given = ((a.prompt, a.scores.get(criterion)) for a in self.file.answers)
        return {prompt: float(score) for prompt, score in given if score is not None}

    @property
    def _parts(self) -> list[Path]:
        file = self.file
        return [Path(p) for p in (file.graft, file.personal, file.adapter) if p]


def read_judgements(paths: Sequence[Path]) -> list[JudgedFile]:
    """Read files of a judge; raises `PomonaError` naming one that is none."""
    return [JudgedFile(path, read_as(path, _File)) for path in paths]


def _client(part: Path) -> str | None:
    """Return NAME of RUN/clients/NAME/graft, as a run publishes it."""
    return part.parts[-2] if part.parts[-3:-2] == ("clients",) else None
