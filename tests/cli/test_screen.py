"""What a command prints and tells to trackers: lines of JSON, nothing, figures of every round."""

import json
import sys
from pathlib import Path

import pytest
from accelerate.tracking import TensorBoardTracker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner

from pomona.artifacts.tracking import TRACKERS, flat, tracked
from pomona.cli.app import app
from pomona.errors import PomonaError
from pomona.progress import silent
from pomona.recipe import dump


@pytest.fixture
def recipe(settings, tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(dump(settings), "utf-8")
    return path


def run(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, list(words))
    return done.exit_code, done.output


def test_progress_and_results_as_lines_of_json(recipe, tmp_path):
    out = tmp_path / "run"
    code, printed = run("federate", str(recipe), "--out", str(out), "--json", "--device", "cpu")
    assert code == 0
    lines = [json.loads(line) for line in printed.splitlines()]
    rounds = [line for line in lines if line.get("stage") == "rounds"]
    assert [line["done"] for line in rounds[:4]] == [0, 1, 2, 3]
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for line in rounds[1:4]:
        losses = [
            sum(own["losses"]) / len(own["losses"])
            for own in metrics
            if own["model"] == "training" and own["round"] == line["done"]
        ]
        assert line["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-12)
        assert line["tokens_per_second"] > 0 and line["memory_gib"] > 0
    assert [line["results"] for line in lines if "results" in line] == [
        json.loads((out / "results.json").read_text())
    ]


def test_quiet_prints_nothing_but_errors(recipe, tmp_path):
    out = str(tmp_path / "run")
    assert run("federate", str(recipe), "--out", out, "--quiet", "--device", "cpu") == (0, "")
    code, printed = run("federate", str(tmp_path / "none.toml"), "--out", out, "--quiet")
    assert code == 2 and "none.toml" in printed
    code, printed = run("federate", str(recipe), "--out", out, "--quiet", "--json")
    assert code == 2 and "give one of them" in printed


def test_tensorboard_has_the_figures_of_every_round(recipe, tmp_path):
    out = tmp_path / "run"
    words = ("federate", str(recipe), "--out", str(out), "--device", "cpu")
    code, printed = run(*words, "--log", "tensorboard")
    assert code == 0, printed
    assert "loss" in printed and "tokens/s" in printed
    read = EventAccumulator(str(out / "tensorboard")).Reload()
    events = read.Scalars("rounds/loss")
    assert [event.step for event in events] == [1, 2, 3]
    assert {"rounds/megabytes_sent", "rounds/memory_gib"} <= set(read.Tags()["scalars"])


def test_wandb_and_trackio_hear_without_a_network(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setattr("trackio.utils.TRACKIO_DIR", tmp_path / "trackio", raising=False)
    told: list[str] = []
    folder = tmp_path / "run"
    with tracked(
        ["wandb", "trackio"], folder, {"seed": 1, "local": {"steps": 2}}, told.append
    ) as t:
        for done in (1, 2, 3):
            t("rounds", done, 3, {"loss": 1.0 / done})
        t("evaluating", 1, 1)
    assert told == []
    (offline,) = folder.glob("wandb/offline-run-*/*.wandb")
    assert b"rounds/loss" in offline.read_bytes()
    kept = b"".join(
        path.read_bytes() for path in (tmp_path / "trackio").rglob("*.*") if path.is_file()
    )
    assert b"rounds/loss" in kept
    assert capsys.readouterr().out == ""  # where lines of JSON may go


def test_a_tracker_that_fails_is_left_out_and_one_that_is_absent_named(tmp_path, monkeypatch):
    told: list[str] = []

    def full(*_given, **_named):
        raise OSError("no space left")

    monkeypatch.setattr(TensorBoardTracker, "log", full)
    with tracked(["tensorboard"], tmp_path, {}, told.append) as track:
        for done in (1, 2):
            track("rounds", done, 3, {"loss": 1.0})
    assert told == ["tensorboard is left out from now on: no space left"]
    with pytest.raises(PomonaError, match='no tracker "mlflow"; there are tensorboard, wandb'):
        with tracked(["mlflow"], tmp_path, {}, told.append):
            pass
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(PomonaError, match=r"wandb is not installed; pip install 'pomona\[wandb\]'"):
        with tracked(["wandb"], tmp_path / "other", {}, told.append):
            pass
    assert list(TRACKERS) == ["tensorboard", "wandb", "trackio"]


def test_settings_are_told_flat():
    assert flat({"a": 1, "b": {"c": [1], "d": {"e": "x"}}}) == {"a": 1, "b.c": "[1]", "b.d.e": "x"}
    silent("rounds", 1, 2, {"loss": 1.0})
