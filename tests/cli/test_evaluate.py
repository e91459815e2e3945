"""`pomona evaluate` as it is used: what it prints, the JSON, the figures."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
from conftest import word_text

from pomona.cli.app import main

Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch, capsys) -> Run:
    """Run the command in this process; return what it printed."""

    def evaluate(*arguments: object) -> str:
        monkeypatch.setenv("COLUMNS", "100")
        monkeypatch.setattr(sys, "argv", ["pomona", "evaluate", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        assert (ended.value.code or 0, err) == (0, "")
        return out

    return evaluate


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for number, name in enumerate(("fruit", "trees")):
        (folder / f"{name}.txt").write_text(word_text(number, 120), encoding="utf-8")
    return folder


def lines_of(out: str, name: str) -> list[list[str]]:
    """The cells of the table lines that begin with a name."""
    cells = [[c.strip() for c in line.split("│")[1:-1]] for line in out.splitlines()]
    return [line for line in cells if line and line[0] == name]


def test_one_length_and_several(run, moe_dir, texts, tmp_path):
    one, many = tmp_path / "one.json", tmp_path / "many.json"
    run(moe_dir, "--text", texts, "--length", 16, "--json", one)
    out = run(moe_dir, "--text", texts, "--length", 16, "--length", 32, "--json", many)
    single, several = json.loads(one.read_text()), json.loads(many.read_text())
    assert single["model"] == several["model"] == str(moe_dir)
    assert (single["lengths"], several["lengths"]) == ([16], [16, 32])
    assert list(single["figures"]) == ["fruit", "trees", "mean"]
    assert several["figures"]["16"] == single["figures"]
    for name in ("fruit", "trees", "mean"):
        assert [line[1] for line in lines_of(out, name)] == ["16", "32"]
        for line in lines_of(out, name):
            assert line[2] == f"{several['figures'][line[1]][name]['loss']:.3f}"


def test_routing_is_printed_stored_and_drawn(run, moe_dir, texts, tmp_path):
    path = tmp_path / "figures.json"
    arguments = [moe_dir, "--text", texts, "--length", 16, "--routing", "--json", path]
    out = run(*arguments, "--figures", tmp_path / "a")
    routing = json.loads(path.read_text())["routing"]
    assert list(routing) == ["fruit", "trees"]
    for name, own in routing.items():
        assert f"experts on {name}, windows of 16 tokens" in out
        assert {len(own[key]) for key in ("load", "entropy", "variation")} == {2}
        assert all(sum(load) == pytest.approx(1) for load in own["load"])
    assert lines_of(out, "1")[0][1] == f"{routing['fruit']['entropy'][1]:.3f}"
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["expert-load-16.svg"]
    svg = (tmp_path / "a/expert-load-16.svg").read_bytes()
    drawn = "".join(ElementTree.fromstring(svg).itertext())
    assert all(text in drawn for text in ("fruit", "trees", "MoE layer 1", "share of assignments"))
    run(*arguments, "--figures", tmp_path / "b")
    assert (tmp_path / "b/expert-load-16.svg").read_bytes() == svg


def test_speed_beside_the_dense_model(run, moe_dir, dense_dir, tmp_path):
    path = tmp_path / "figures.json"
    given = ("--length", 20, "--new-tokens", 3, "--repeats", 2, "--json", path)
    out = run(moe_dir, "--speed", "--dense", dense_dir, *given)
    found = json.loads(path.read_text())
    for name in ("model", "dense"):
        own = found["figures"][name]
        assert lines_of(out, name)[0][1:] == [f"{own['prefill']:.1f}", f"{own['decode']:.1f}"]
        assert len(own["decode_seconds"]) == 2
    for key, value in found["ratio"].items():
        model, dense = (found["figures"][name][key] for name in ("model", "dense"))
        assert value == model / dense
    assert "prompt of 17 tokens, 3 new ones" in out


def test_tasks_as_a_table_and_as_json(run, moe_dir, tmp_path):
    pytest.importorskip("lm_eval", reason="the `eval` extra is not installed")
    questions, path = tmp_path / "own.jsonl", tmp_path / "figures.json"
    rows = [
        {"question": word_text(i, 4), "choices": ["red", "plum tree"], "answer": i % 2}
        for i in range(6)
    ]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ("--data", questions, "--fewshot", 1, "--limit", 4, "--json", path)
    out = run(moe_dir, "--tasks", "multiple_choice", *given)
    own = json.loads(path.read_text())["figures"]["multiple_choice"]
    assert (own["questions"], own["fewshot"]) == (4, 1)
    shown = {line[1]: line[2:] for line in lines_of(out, "multiple_choice")}
    assert set(shown) == set(own["metrics"]) == {"acc", "acc_norm"}
    for metric, value in own["metrics"].items():
        assert shown[metric] == [f"{value:.4f}", f"{own['errors'][metric]:.4f}", "4", "1"]
