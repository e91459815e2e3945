"""How a command tells what it does: bars and tables, JSON lines, or nothing at all."""

import json
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pomona.cli.console import console, print_comparison, progress_bars, quiet_libraries
from pomona.errors import PomonaError
from pomona.progress import NONE, Figures, Progress, silent, to_all


@dataclass(frozen=True)
class Screen:
    """What a command prints: with `lines` one JSON object per line, with `quiet` nothing but errors."""

    quiet: bool = False
    lines: bool = False

    def __post_init__(self) -> None:
        if self.quiet and self.lines:
            raise PomonaError("--quiet prints nothing and --json prints lines; give one of them")

    @contextmanager
    def progress(self, *listeners: Progress) -> Generator[Progress]:
        """Yield what hears the progress, shows it, and hands it on."""
        if not (self.quiet or self.lines):
            with progress_bars() as shown:
                yield to_all(shown, *listeners)
            return
        quiet_libraries()
        yield to_all(_as_line if self.lines else silent, *listeners)

    def tell(self, sentence: str) -> None:
        """Print what a user should know."""
        if self.lines:
            _print({"note": sentence})
        elif not self.quiet:
            console.print(sentence)

    def finished(self, runs: Sequence[Path]) -> None:
        """Print the results of finished runs."""
        from pomona.artifacts.finished import load_run

        if self.lines:
            for run in runs:
                _print({"run": str(run), "results": load_run(run).results})
        elif not self.quiet:
            print_comparison(runs)


def _as_line(stage: str, done: int, total: int, figures: Figures = NONE, /) -> None:
    _print({"stage": stage, "done": done, "total": total, **figures})


def _print(entry: Mapping[str, Any]) -> None:
    console.print(json.dumps(entry, ensure_ascii=False))
