"""The help of every command is complete and fits a terminal; usage mistakes exit with 2."""

import re
import subprocess
import sys
from itertools import pairwise

import pytest
import typer

import pomona
from pomona.cli.app import app, main

COMMANDS = (
    *("reconstruct", "federate", "evaluate", "judge", "report", "demo"),
    *("chat", "serve-model", "export", "inspect", "recipe"),
    *("serve", "join", "keys", "status"),
)


def pomona_says(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    """Run the command line in this process; return exit code, stdout and stderr."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "argv", ["pomona", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def test_every_command_is_tested_here():
    assert set(typer.main.get_command(app).commands) == set(COMMANDS)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_exits_with_0_and_fits_80_columns(monkeypatch, capsys, command):
    code, out, err = pomona_says(monkeypatch, capsys, *command.split(), "--help")
    assert (code, err) == (0, "")
    assert f"Usage: pomona {command}".strip() in out
    assert [line for line in out.splitlines() if len(line.rstrip()) > 80] == []


def test_the_list_of_commands_has_a_line_for_each(monkeypatch, capsys):
    _, out, _ = pomona_says(monkeypatch, capsys, "--help")
    for command in COMMANDS:
        assert re.search(rf"│ {command} +[A-Z]\w+ ", out)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_and_argument_is_explained(monkeypatch, capsys, command):
    _, out, _ = pomona_says(monkeypatch, capsys, command, "--help")
    described = " ".join(line.strip("│ ") for line in out.splitlines())
    params = typer.main.get_command(app).commands[command].params
    assert len(params) >= (1 if command in ("status", "inspect") else 2)
    for param in params:
        assert param.help, param.name
        assert param.help.endswith("."), param.name
        assert " ".join(param.help.split()[:3]) in described, param.name
        if param.param_type_name == "argument":
            metavar = param.metavar.strip("[].")
            assert metavar.isupper(), param.name
            body = described.split("Usage:")[1]
            assert metavar in body, param.name


@pytest.mark.parametrize("command", ["reconstruct", "federate", "evaluate"])
def test_the_text_of_a_command_says_what_its_argument_is(monkeypatch, capsys, command):
    _, out, _ = pomona_says(monkeypatch, capsys, command, "--help")
    (argument,) = (
        param
        for param in typer.main.get_command(app).commands[command].params
        if param.param_type_name == "argument"
    )
    assert re.search(rf"\n {argument.metavar} (is|names) ", out)


def test_no_line_of_a_paragraph_ends_early(monkeypatch, capsys):
    """Docstrings are broken at 100 columns; their line ends must not reach the screen."""
    for command in COMMANDS:
        _, out, _ = pomona_says(monkeypatch, capsys, command, "--help")
        lines = [line.rstrip() for line in out.split("╭")[0].splitlines()]
        for line, following in pairwise(lines):
            first = following.strip().split(" ")[0]
            if line.startswith(" ") and first:
                assert len(line) + 1 + len(first) > 78, line


def test_version(monkeypatch, capsys):
    assert pomona_says(monkeypatch, capsys, "--version")[:2] == (
        0,
        f"pomona {pomona.__version__}\n",
    )


def test_python_dash_m_pomona_says_its_version():
    done = subprocess.run(
        [sys.executable, "-m", "pomona", "--version"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, f"pomona {pomona.__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["graft"], "graft"),
        (["federate", "--out", "x"], "RECIPE"),
        (["federate", "recipe.toml"], "--out"),
        (["federate", "recipe.toml", "--out", "x", "--rounds", "3"], "--rounds"),
        (["reconstruct", "model", "--out", "x", "--experts", "many"], "--experts"),
        (["evaluate", "model", "--length", "1.5"], "--length"),
        (["report"], "RUN"),
    ],
)
def test_a_mistake_in_the_command_exits_with_2_and_names_it(monkeypatch, capsys, arguments, says):
    code, out, err = pomona_says(monkeypatch, capsys, *arguments)
    assert (code, out) == (2, "")
    assert says in err


def test_help_needs_no_heavy_library():
    """A command line that answers at once: torch alone takes seconds to import."""
    heavy = "{'torch', 'transformers', 'numpy', 'scipy', 'pydantic', 'matplotlib', 'peft'}"
    code = f"import sys, pomona.cli.app; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("command", "interrupts"),
    [
        (("evaluate", "model", "--speed"), "pomona.pipelines.evaluate.speed"),
        (("report", "run"), "pomona.artifacts.report.write_report"),
    ],
)
def test_an_interruption_does_not_promise_what_is_not_so(monkeypatch, capsys, command, interrupts):
    """These commands keep nothing, so nothing goes on."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(interrupts, interrupted)
    code, _, err = pomona_says(monkeypatch, capsys, *command)
    assert (code, err) == (130, "interrupted; nothing of it is kept\n")


def test_an_interruption_is_one_sentence_and_exits_with_130(monkeypatch, capsys, tmp_path):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pomona.recipe.read_recipe", interrupted)
    code, out, err = pomona_says(
        monkeypatch, capsys, "federate", "recipe.toml", "--out", str(tmp_path / "run")
    )
    assert (code, out) == (130, "")
    assert err == "interrupted; run the same command again to go on\n"
