"""Every `pomona` command in the docs uses commands, options and keys that there are; it is parsed, not run."""

import re
import shlex
from collections.abc import Iterator

import click
import pytest
import typer
from conftest import ROOT
from pages import NAMES, SHELL, blocks, inline, read

from pomona.cli.app import app
from pomona.recipe.changes import changed

COMMANDS = typer.main.get_command(app).commands
CHECKED = (click.Choice, click.types.IntParamType, click.types.FloatParamType)
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.M))


def commands(text: str) -> Iterator[list[str]]:
    """The commands of a shell text, word by word; pipes, redirections and comments end one."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars="|&;<>")
        lexer.whitespace_split = True
        words: list[str] = []
        try:
            for word in lexer:
                if set(word) <= set("|&;<>"):
                    yield words
                    words = []
                else:
                    words.append(word)
        except ValueError:  # an apostrophe: something that a command has said
            continue
        yield words


def told() -> list[tuple[str, list[str]]]:
    """Every command that a block of the docs begins with `pomona`, services' too."""
    found = [(b.where, words) for b in blocks(*SHELL) for words in commands(b.text)]
    for block in blocks("ini"):
        for line in re.findall(r"^ExecStart=\S*/(pomona .*)$", block.text, re.M):
            found.append((block.where, shlex.split(line)))
    return [(where, words[1:]) for where, words in found if words[:1] == ["pomona"]]


def mentioned() -> list[tuple[str, list[str]]]:
    """Commands in running text, which need not be whole."""
    spans = [(n, t.content) for n in NAMES for t in inline(n) if t.type == "code_inline"]
    return [
        (f"{name}: {text}", text.replace("\n", " ").split()[1:])
        for name, text in spans
        if re.match(r"pomona [a-z]", text)
    ]


def check(words: list[str]) -> None:
    """Parse a command as the command line would."""
    command = COMMANDS[words[0]]
    words = [word for word in words[1:] if "…" not in word]
    given, rest, _ = command.make_parser(click.Context(command)).parse_args(words)
    assert rest == [], f"too many words: {rest}"
    for option in command.params:
        value = given.get(option.name)
        said = isinstance(value, (str, bool, list, tuple)) and value not in (
            [],
            (),
        )  # else click's own "unset"
        assert said or not option.required, f"{option.name} is missing"
        if isinstance(option.type, CHECKED) and isinstance(value, str):
            option.type.convert(value, option, None)
    if given.get("changes"):
        read(changed({}, given["changes"]), " ".join(words))


TOLD, MENTIONED = told(), mentioned()


def test_commands_were_found():
    assert len(TOLD) > 30 and len(MENTIONED) > 30
    assert {words[0] for _, words in TOLD + MENTIONED if words[0] in COMMANDS} == COMMANDS.keys()


@pytest.mark.parametrize(("where", "words"), TOLD, ids=[where for where, _ in TOLD])
def test_a_command_is_one(where, words):
    if words != ["--help"] and "COMMAND" not in words:
        check(words)


@pytest.mark.parametrize(("where", "words"), MENTIONED, ids=[where for where, _ in MENTIONED])
def test_a_command_in_running_text_is_one(where, words):
    known = {name for option in COMMANDS[words[0]].params for name in option.opts}
    assert {word for word in words if word.startswith("--")} <= known


def test_what_make_and_python_are_asked_for_is_there():
    ran = [words for block in blocks(*SHELL) for words in commands(block.text)]
    ran += [t.content.split() for n in NAMES for t in inline(n) if t.type == "code_inline"]
    made = {words[1] for words in ran if len(words) > 1 and words[0] == "make"}
    scripts = {words[1] for words in ran if len(words) > 1 and words[0] == "python"}
    scripts = {script for script in scripts if script.endswith(".py")}
    assert made <= TARGETS and len(made) > 10
    elsewhere = {
        "benchmarks/real.py",
        "convert_hf_to_gguf.py",
    }  # gone, as the log tells; llama.cpp's
    assert {script for script in scripts if not (ROOT / script).is_file()} == elsewhere


@pytest.mark.parametrize(
    "line", ["federate a.toml --outt b", "federate a b", "federate", "keys --site", "fedrate a"]
)
def test_a_wrong_command_is_seen(line):
    with pytest.raises((click.UsageError, AssertionError, KeyError)):
        check(line.split())
