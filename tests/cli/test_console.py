"""Progress on a terminal and away from one."""

import io
import re

import pytest
from rich.console import Console

from pomona.cli import console as module
from pomona.cli.console import print_table, progress_bars


@pytest.fixture
def screen(monkeypatch):
    """Put another console in place; return it by whether it is a terminal."""

    def put(terminal: bool) -> Console:
        made = Console(
            file=io.StringIO(),
            force_terminal=terminal,
            width=80,
            highlight=False,
            markup=False,
            soft_wrap=True,
            color_system=None,
        )
        monkeypatch.setattr(module, "console", made)
        return made

    return put


def test_away_from_a_terminal_progress_is_plain_lines_that_end_complete(screen):
    console = screen(False)
    with progress_bars() as progress:
        for done in range(41):
            progress("rounds", done, 40)
            for part in range(4):
                progress("evaluating", part, 4)
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "rounds 0/40"
    assert [line for line in lines if line.startswith("rounds")] == [
        f"rounds {done}/40" for done in range(0, 41, 4)
    ]
    assert [line for line in lines if line.startswith("eval")] == [
        "evaluating 0/4",
        "evaluating 1/4",
        "evaluating 2/4",
        "evaluating 3/4",
        "evaluating 4/4",
    ]
    assert "\x1b" not in console.file.getvalue()


def test_on_a_terminal_bars_fit_and_end_complete(screen):
    console = screen(True)
    with progress_bars() as progress:
        progress("local-only compensating", 0, 4)
        progress("evaluating", 3, 4)
    text = re.sub(r"\x1b\[[?\d;]*[A-Za-z]|\r", "\n", console.file.getvalue())
    last = [line.rstrip() for line in text.splitlines() if "/4" in line][-2:]
    assert ["4/4" in line for line in last] == [True, True]
    assert [line.split()[0] for line in last] == ["local-only", "evaluating"]
    assert max(map(len, last)) <= 80


@pytest.mark.parametrize("terminal", [True, False])
def test_an_error_leaves_progress_where_it_was(screen, terminal):
    console = screen(terminal)
    with pytest.raises(ValueError, match="stop"), progress_bars() as progress:
        progress("rounds", 1, 4)
        raise ValueError("stop")
    assert "1/4" in console.file.getvalue()
    assert "4/4" not in console.file.getvalue()


def test_a_table_keeps_long_and_bracketed_names_whole(screen):
    console = screen(False)
    title = "/a/long/path/" + "x" * 90 + "/[bold]model"
    print_table(title, ["client", "FLEx"], [["[red]apples", "1.234"]])
    text = console.file.getvalue()
    assert text.splitlines()[0] == title
    assert "[red]apples" in text
    assert max(map(len, text.splitlines()[1:])) <= 80
