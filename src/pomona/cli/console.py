"""What the commands have in common on screen: a progress bar and a table."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from pomona.artifacts.table import MEASURES, load_runs, table
from pomona.progress import Progress as Show

console = Console(highlight=False)


@contextmanager
def progress_bars(title: str = "") -> Generator[Show]:
    """Yield `progress(stage, done, total)`, drawing one bar per stage.

    Away from a terminal the bars become one line per finished stage.
    """
    bars = Progress(
        TextColumn("[bold]{task.description:<24}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    _quiet_libraries()
    stages: dict[str, TaskID] = {}

    def progress(stage: str, done: int, total: int) -> None:
        label = f"{title} {stage}".strip()
        if stage not in stages:
            stages[stage] = bars.add_task(label, total=total)
            if not console.is_terminal:
                console.print(f"{label}: started", style="dim")
        bars.update(stages[stage], completed=done, total=total)

    with bars:
        yield progress


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; the first column is text, the others are figures."""
    grid = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        grid.add_column(column, justify="left" if number == 0 else "right")
    for row in rows:
        grid.add_row(*row)
    console.print(grid)


def print_comparison(runs: Sequence[Path]) -> None:
    """Print finished runs side by side: one table per measure, the untuned base first."""
    finished = load_runs(runs)
    for measure, title in MEASURES.items():
        header, rows = table(finished, measure)
        print_table(title, header, rows)


def _quiet_libraries() -> None:
    """Transformers' own bars and advice would tear ours apart."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
