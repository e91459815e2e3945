"""Whatever happened to a file of a run, the sentence names it and nothing else is touched."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pomona.artifacts.run import RunDirectory
from pomona.cli.app import main
from pomona.federation.clients import ClientData
from pomona.federation.evaluation import Evaluation
from pomona.federation.graft import Graft
from pomona.federation.local import LocalTraining
from pomona.federation.partition import ByCategory
from pomona.federation.settings import FederateSettings
from pomona.models.lora import LoRA
from pomona.recipe import dump

OTHERS = (None, -1.5, "é", [], {})


def call(*arguments: object) -> int:
    """Run the command line in this process and return its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pomona", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
    return int(ended.value.code or 0)


@pytest.fixture(scope="module")
def runs(moe_dir, rows_dir, tmp_path_factory) -> Path:
    """A folder with a recipe, its finished run, and one that was interrupted after a round."""
    folder = tmp_path_factory.mktemp("runs")
    settings = FederateSettings(
        model=str(moe_dir),
        data=ClientData(
            train=rows_dir / "train.jsonl",
            test=rows_dir / "test.jsonl",
            partition=ByCategory(("pears", "plums")),
        ),
        rounds=2,
        max_length=96,
        adapter=LoRA(2, 4.0),
        graft=Graft(rank=2),
        local=LocalTraining(steps=1, batch=2),
        evaluation=Evaluation(every=2, rows=2, answers=1, new_tokens=2),
    )
    (folder / "recipe.toml").write_text(dump(settings), encoding="utf-8")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunDirectory, "note_time", interrupt)
        assert call("federate", folder / "recipe.toml", "--out", folder / "half") == 130
    assert call("federate", folder / "recipe.toml", "--out", folder / "whole") == 0
    return folder


def damages(content: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield what can become of any file, and of JSON field by field."""
    yield "empty", b""
    yield "truncated", content[: len(content) // 2]
    yield "binary", bytes(range(128, 256)) * 40
    yield "zeros", bytes(len(content))
    yield "a list", b"[]"
    yield "a number", b"3"
    yield "deep", b'{"a": ' * 5000 + b"1" + b"}" * 5000
    yield "half a character", b'{"a": "\\ud800"}'
    try:
        whole = json.loads(content)
    except ValueError:
        return
    for key in whole:
        yield f"without {key}", json.dumps({k: v for k, v in whole.items() if k != key}).encode()
        for other in OTHERS:
            yield f"{key}: {other!r}", json.dumps(whole | {key: other}).encode()
        broken = json.dumps(whole | {key: "\ud800"}).encode()
        yield f"{key}: half a character", broken


# A field may take these values as well, and what a file says besides is not read.
READ = {
    "run.json": {"format", "method", "seed", "pomona", "python", "torch", "transformers"},
    "inputs.json": {"model", "clients"},
    "results.json": {"base", "personal", "routing", "data", "files"},
    "experts.json": {"experts"},
    "state.json": {"round", "metrics_bytes", "server", "clients"},
    "adapter_config.json": {"r", "lora_alpha", "target_modules"},
    "graft_config.json": {"form", "rank", "alpha", "bias"},
    "pomona.json": {"model", "base", "template", "max_length", "dtype"},
}


def must_refuse(file: str, damage: str) -> bool:
    """Whether a damage is one that the reader cannot take for content."""
    key, colon, value = damage.removeprefix("without ").partition(": ")
    if not colon and not damage.startswith("without "):
        return True
    if value == "half a character":
        return True
    if key not in READ[file]:
        return False
    fits = {
        ("run.json", "method"): "é",
        ("run.json", "pomona"): "é",
        ("run.json", "python"): "é",
        ("run.json", "torch"): "é",
        ("run.json", "transformers"): "é",
        ("state.json", "clients"): "{}",  # nobody has trained yet
        ("results.json", "routing"): "{}",
        ("results.json", "files"): "{}",
        ("graft_config.json", "alpha"): "-1.5",
        ("adapter_config.json", "lora_alpha"): "-1.5",
        ("pomona.json", "model"): "é",
        ("pomona.json", "dtype"): "é",
        ("pomona.json", "base"): "{}",
    }
    optional = damage == f"without {key}" and file == "adapter_config.json"
    return not optional and value.strip("'") != fits.get((file, key), "nothing")


def refuse_all(
    path: Path, commands: list[list[object]], capsys: pytest.CaptureFixture[str], root: Path
) -> int:
    """Damage one file in every way, expect a sentence from every command; return how many."""
    content, told = path.read_bytes(), 0
    others = {p: p.read_bytes() for p in root.rglob("*") if p.is_file() and p != path}
    seen = set[str]()
    for damage, broken in damages(content):
        wrong = must_refuse(path.name, damage)
        key = damage.removeprefix("without ").partition(":")[0]
        if broken == content or (not wrong and key in seen):  # what is not read is no trouble twice
            continue
        seen |= set() if wrong else {key}
        path.write_bytes(broken)
        for command in commands if wrong else commands[:1]:  # what is fine takes a whole report
            capsys.readouterr()
            code, err = call(*command), capsys.readouterr().err
            where = f"{path.name}, {damage}, {command[0]}: {err}"
            assert "Traceback" not in err, where
            if wrong:
                assert code == 2, where
                assert len(err.splitlines()) == 1, where
                assert err.startswith("error: "), where
                assert path.name in err or str(path.parent) in err, where
                told += 1
            assert code in (0, 2), where
            assert path.read_bytes() == broken, where
            assert {p: p.read_bytes() for p in others} == others, where
    path.write_bytes(content)
    return told


TOP = {"run.json", "recipe.toml", "inputs.json", "metrics.jsonl", "answers.jsonl", "results.json"}


@pytest.mark.parametrize("name", sorted(TOP))
def test_a_damaged_file_of_a_finished_run_is_named(runs, capsys, tmp_path, name):
    whole = runs / "whole"
    commands: list[list[object]] = [
        ["federate", runs / "recipe.toml", "--out", whole],
        ["report", whole, "--out", tmp_path / "page.html"],
    ]
    assert refuse_all(whole / name, commands, capsys, whole) >= 16


PARTS = (
    "shared/adapter_config.json",
    "shared/adapter_model.safetensors",
    "shared/pomona.json",
    "clients/pears/graft/graft_config.json",
    "clients/pears/graft/graft.safetensors",
    "clients/pears/graft/pomona.json",
)


@pytest.mark.parametrize("name", PARTS)
def test_a_damaged_adapter_or_graft_is_named(runs, capsys, moe_dir, rows_dir, name):
    part = runs / "whole" / name
    option = "--adapter" if name.startswith("shared") else "--graft"
    short = ["--rows", rows_dir / "test.jsonl", "--limit", 1, "--length", 48, "--new-tokens", 0]
    command: list[object] = ["evaluate", moe_dir, option, part.parent, *short]
    assert refuse_all(part, [command], capsys, part.parent) >= 8


CHECKPOINT = {
    "experts.json",
    "state.json",
    "server.1.server.safetensors",
    "pears.1.safetensors",
}


@pytest.mark.parametrize(
    "name",
    [
        "run.json",
        "recipe.toml",
        "inputs.json",
        "metrics.jsonl",
        *(f"checkpoint/{name}" for name in sorted(CHECKPOINT)),
    ],
)
def test_a_damaged_file_of_an_unfinished_run_is_named(runs, capsys, tmp_path, monkeypatch, name):
    """Whatever is not refused stops before it trains: only reading is looked at here."""
    half = shutil.copytree(runs / "half", tmp_path / "half")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    assert refuse_resume(half / name, runs / "recipe.toml", half, capsys) >= 8
    monkeypatch.setattr(RunDirectory, "note_time", interrupt)
    assert call("federate", runs / "recipe.toml", "--out", half) == 130  # it still goes on


def refuse_resume(path: Path, recipe: Path, half: Path, capsys) -> int:
    """Only damages that must be refused: the others would let the run go on and end."""
    content, told = path.read_bytes(), 0
    for damage, broken in damages(content):
        if not must_refuse(path.name, damage) or broken == content:
            continue
        path.write_bytes(broken)
        before = {p: p.read_bytes() for p in half.rglob("*") if p.is_file()}
        capsys.readouterr()
        code, err = call("federate", recipe, "--out", half), capsys.readouterr().err
        where = f"{path.name}, {damage}: {err}"
        assert code == 2, where
        assert len(err.splitlines()) == 1, where
        assert path.name in err or str(half) in err, where
        assert {p: p.read_bytes() for p in half.rglob("*") if p.is_file()} == before, where
        told += 1
    path.write_bytes(content)
    return told


def test_these_are_all_files_of_a_run(runs):
    """timings.jsonl and holdings are read by nobody; the parts of a second client are as those of the first."""

    def names(folder: Path) -> set[str]:
        return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}

    second = {name.replace("pears", "plums") for name in PARTS}
    assert names(runs / "whole") == TOP | set(PARTS) | second | {
        "timings.jsonl",
        "holdings.csv",
        "holdings.svg",
    }
    assert len(names(runs / "whole")) == 18
    begun = {"run.json", "recipe.toml", "inputs.json", "metrics.jsonl"}
    begun |= {"holdings.csv", "holdings.svg"}
    saved = {f"checkpoint/{name}" for name in (*CHECKPOINT, "plums.1.safetensors")}
    assert names(runs / "half") == begun | saved


@pytest.mark.parametrize("content", [b"\xff\xfe", b"model = ", b"a = 1\n" * 2, b"", b"\x00"])
def test_a_recipe_that_is_damaged_is_named(tmp_path, capsys, content):
    path = tmp_path / "mine.toml"
    path.write_bytes(content)
    for command in (["federate", path], ["reconstruct", "--recipe", path]):
        capsys.readouterr()
        assert call(*command, "--out", tmp_path / "out") == 2
        err = capsys.readouterr().err
        assert len(err.splitlines()) == 1
        assert str(path) in err
    assert not (tmp_path / "out").exists()
