"""What the commands have in common on screen: a progress bar and a table."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.table import Table

from pomona.progress import NONE, Figures, Progress

# Paths are printed as they are: never broken over lines, "[" in them is no markup.
console = Console(highlight=False, markup=False, soft_wrap=True)


@contextmanager
def progress_bars() -> Generator[Progress]:
    """Yield `progress(stage, done, total)`, drawing one bar per stage, with the last figures beside it.

    Away from a terminal a stage writes a plain line when it starts and at every tenth of its way.
    A stage that came to its end without saying so is shown complete, unless an error ended it.
    """
    quiet_libraries()
    with _bars() if console.is_terminal else _Lines() as shown:
        yield shown.progress
        shown.complete()


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; the first column is text, the others are figures."""
    grid = Table()
    for number, column in enumerate(columns):
        justify = "left" if number == 0 else "right"
        grid.add_column(column, justify=justify, overflow="fold")  # never cut: names would be alike
    for row in rows:
        grid.add_row(*row)
    console.print(title, style="italic")
    console.print(grid, soft_wrap=False)


def print_comparison(runs: Sequence[Path]) -> None:
    """Print finished runs side by side: one table per measure, the untuned base first."""
    from pomona.artifacts.table import MEASURES, load_runs, measured, table

    finished = load_runs(runs)
    for measure in measured(finished):
        header, rows = table(finished, measure)
        print_table(str(MEASURES[measure]), header, rows)


@dataclass
class _Bars:
    """One bar per stage on a terminal."""

    drawn: RichProgress
    stages: dict[str, TaskID] = field(default_factory=dict[str, TaskID])

    def __enter__(self) -> "_Bars":
        self.drawn.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.drawn.stop()

    def progress(self, stage: str, done: int, total: int, figures: Figures = NONE, /) -> None:
        if stage not in self.stages:
            self.stages[stage] = self.drawn.add_task(stage, total=total, figures="")
        task = self.stages[stage]
        self.drawn.update(task, completed=done, total=total)
        if figures:
            self.drawn.update(task, figures=_shown(figures))

    def complete(self) -> None:
        for task in self.drawn.tasks:
            self.drawn.update(task.id, completed=task.total)


@dataclass
class _Lines:
    """Plain lines, few enough for a log file: every tenth of a stage, once."""

    shown: dict[str, tuple[int, int, int]] = field(default_factory=dict[str, tuple[int, int, int]])

    def __enter__(self) -> "_Lines":
        return self

    def __exit__(self, *_error: object) -> None:
        pass

    def progress(self, stage: str, done: int, total: int, figures: Figures = NONE, /) -> None:
        tenth = 10 * done // max(total, 1)
        if stage not in self.shown or tenth > self.shown[stage][0]:
            told = f": {_shown(figures)}" if figures else ""
            console.print(f"{stage} {done}/{total}{told}")
            self.shown[stage] = (tenth, done, total)

    def complete(self) -> None:
        for stage, (_, done, total) in self.shown.items():
            if done < total:
                self.progress(stage, total, total)


def _bars() -> _Bars:
    columns = (
        TextColumn("{task.description:<24}", markup=False),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}", markup=False),
    )
    return _Bars(RichProgress(*columns, console=console))


def _shown(figures: Figures) -> str:
    """Return the figures that one watches; trackers are told all of them."""
    forms = {"loss": "loss {:.3f}", "tokens_per_second": "{:,.0f} tokens/s"}
    forms["memory_gib"] = "{:.1f} GiB"
    return ", ".join(form.format(figures[name]) for name, form in forms.items() if name in figures)


def quiet_libraries() -> None:
    """Transformers' own bars and advice would tear ours apart."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
