"""Tasks of the harness inside a run: what `pomona evaluate` finds of its parts, told on the report's page."""

import html
import json
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
from conftest import word_text

from pomona.artifacts.finished import load_runs
from pomona.artifacts.personal import PersonalModel
from pomona.artifacts.report import page
from pomona.artifacts.run import RunDirectory
from pomona.errors import PomonaError
from pomona.federation.evaluation import Evaluation
from pomona.federation.local import LocalTraining
from pomona.federation.strategies import LocalOnly
from pomona.files import digest_of
from pomona.pipelines.evaluate import on_tasks
from pomona.pipelines.federate import federate
from pomona.recipe import dump, read_recipe

pytest.importorskip("lm_eval", reason="the `eval` extra is not installed: pip install pomona[eval]")

CLIENTS = ("apples", "pears", "plums")


@pytest.fixture
def questions(tmp_path):
    made = [
        {
            "question": word_text(i, 6),
            "choices": [word_text(100 * i + c, 1 + c) for c in range(3)],
            "answer": i % 3,
        }
        for i in range(40)
    ]
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(q) + "\n" for q in made), encoding="utf-8")
    return path


@pytest.fixture
def asking(settings, questions):
    """Two steps that move the model far enough to answer otherwise."""
    return replace(
        settings,
        rounds=1,
        local=LocalTraining(steps=3, batch=2, learning_rate=0.3, final_learning_rate=0.3),
        evaluation=Evaluation(
            rows=1,
            answers=1,
            new_tokens=2,
            tasks=("multiple_choice",),
            task_data=questions,
            fewshot=1,
            limit=30,
        ),
    )


def ran(settings, path):
    about = {"command": [], "method": settings.name, "seed": settings.seed}
    with RunDirectory.open(path, dump(settings), about) as run:
        return federate(settings, run)


def lines_of(path):
    return [json.loads(x) for x in (path / "tasks.jsonl").read_text("utf-8").splitlines()]


def test_every_model_is_asked_what_pomona_evaluate_asks_it(asking, questions, tmp_path):
    run = tmp_path / "run"
    results = ran(asking, run)
    lines = lines_of(run)
    assert results["files"]["tasks.jsonl"] == digest_of(run / "tasks.jsonl")
    models = {(x["model"], x["client"]) for x in lines}
    assert models == {("base", None), ("shared", None), *(("personal", c) for c in CLIENTS)}
    for model, client in models:
        parts = {} if model == "base" else {"adapter": run / "shared"}
        if client is not None:
            parts["graft"] = run / f"clients/{client}/graft"
        personal = PersonalModel(asking.model, **parts)
        found = on_tasks(personal, ["multiple_choice"], questions, 1, 30).tasks["multiple_choice"]
        own = {x["metric"]: x for x in lines if (x["model"], x["client"]) == (model, client)}
        assert {metric: x["value"] for metric, x in own.items()} == pytest.approx(found.metrics)
        assert {metric: x["error"] for metric, x in own.items()} == pytest.approx(found.errors)
        assert all((x["questions"], x["fewshot"]) == (30, 1) for x in own.values())
        for line in own.values():
            assert len(line["scores"]) == 30
            assert np.mean(line["scores"]) == pytest.approx(line["value"])
    assert len({line["asked"] for line in lines}) == 1, "all are asked the same"
    values = {(x["model"], x["client"]): x["value"] for x in lines if x["metric"] == "acc_norm"}
    assert len(set(values.values())) > 1, "training has changed answers"


def asked(line, model):
    return (line["model"], line["metric"]) == (model, "acc")


def paired_figures(a, b):
    """Bounds and p-value of a difference by the bootstrap as its definition says, over the same draws."""
    chosen = np.random.default_rng(0).integers(len(a), size=(2000, len(a)))
    drawn = (a - b)[chosen].mean(1)
    tail = min((drawn <= 1e-12).mean(), (drawn >= -1e-12).mean())
    return *np.quantile(drawn, [0.025, 0.975]), min(1.0, max(2 * tail, 1 / 2000))


def test_the_page_has_the_base_beside_the_means(asking, tmp_path):
    paths = []
    for name, change in (("flex", {}), ("alone", {"strategy": LocalOnly()})):
        for seed in range(2 if name == "flex" else 1):
            made = replace(asking, name=name, seed=seed, **change)
            paths.append(tmp_path / f"{name}-{seed}")
            ran(made, paths[-1])
    told = re.sub(r"</t[dh]>", "|", page(load_runs(paths), "alone").replace("</tr>", "\n"))
    told = html.unescape(re.sub(r"<[^>]+>", "", told)).partition("What was forgotten: tasks")[2]
    rows = [
        line.split("|") for line in told.splitlines() if line.startswith("multiple_choice|acc|")
    ]
    assert [row[2] for row in rows] == ["base", "flex, shared", "flex, personal", "alone, personal"]
    lines = [x for path in paths[:2] for x in lines_of(path) if x["metric"] == "acc"]
    base, own = (
        np.mean([x["value"] for x in lines if x["model"] == model])
        for model in ("base", "personal")
    )
    lowest = min(np.mean([x["value"] for x in lines if x["client"] == c]) for c in CLIENTS)
    assert [float(x) for x in (rows[0][3], rows[2][3], rows[2][9])] == pytest.approx(
        [base, own, lowest], abs=6e-5
    )
    assert float(rows[2][5]) == pytest.approx(own - base, abs=6e-5)
    assert (rows[0][5:9], rows[1][9], rows[2][10]) == (["–"] * 4, "–", "30")
    base_n, own_n, alone_n = (
        np.mean([x["scores"] for path in some for x in lines_of(path) if asked(x, model)], axis=0)
        for some, model in (
            (paths[:2], "base"),
            (paths[:2], "personal"),
            (paths[2:], "personal"),
        )
    )
    low, high, p = paired_figures(own_n, base_n)
    assert rows[2][6:8] == [f"{low:+.4f} to {high:+.4f}", f"{p:.4f}"]
    assert all(float(row[8]) >= float(row[7]) for row in rows[1:]), "corrected for all rows"
    low, high, p = paired_figures(own_n, alone_n)
    (against,) = [
        x.split("|") for x in told.splitlines() if "flex − alone, multiple_choice (acc)|" in x
    ]
    assert against[1:4] == [
        f"{own_n.mean() - alone_n.mean():+.4f}",
        f"{low:+.4f} to {high:+.4f}",
        f"{p:.4f}",
    ]
    assert "From tasks.jsonl" in told


def test_a_run_without_tasks_has_no_table(asking, tmp_path):
    ran(replace(asking, evaluation=Evaluation(rows=1, answers=1, new_tokens=2)), tmp_path / "run")
    assert not (tmp_path / "run/tasks.jsonl").exists()
    assert "forgotten: tasks" not in page(load_runs([tmp_path / "run"]))


def test_what_cannot_be_asked_is_told_before_training(asking, questions, tmp_path):
    wrong = {
        "reads a local file; name it with evaluation.task_data": {"task_data": None},
        "evaluation.task_data is read by mmlu and multiple_choice only": {"tasks": ("arc_easy",)},
        "has 39 examples and 40 are asked for": {"fewshot": 40},
        "holds no test/SUBJECT_test.csv": {"tasks": ("mmlu",), "task_data": tmp_path},
        "none.jsonl": {"task_data": tmp_path / "none.jsonl"},
    }
    for number, (says, change) in enumerate(wrong.items()):
        made = replace(asking, evaluation=replace(asking.evaluation, **change))
        with pytest.raises(PomonaError, match=re.escape(says)):
            ran(made, tmp_path / f"run-{number}")
        assert not (tmp_path / f"run-{number}/checkpoint").exists()


def test_without_the_extra_nothing_is_trained(asking, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "pomona.evaluation.harness", raising=False)
    monkeypatch.delattr("pomona.evaluation.harness", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(PomonaError, match=r"pip install 'pomona\[eval\]'"):
        ran(asking, tmp_path / "run")
    assert not (tmp_path / "run/checkpoint").exists()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"limit": -1}, "evaluation limit -1 is negative"),
        ({"tasks": ("mmlu",), "fewshot": -2}, "evaluation fewshot -2 is negative"),
        ({"fewshot": 2}, "are for tasks"),
    ],
)
def test_numbers_that_do_not_fit_are_told(given, says):
    with pytest.raises(PomonaError, match=says):
        Evaluation(**given)


def test_a_recipe_says_it_and_reads_back(asking, tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(dump(asking))
    assert read_recipe(path, type(asking)) == asking
    text = path.read_text().replace(str(asking.evaluation.task_data), "own.jsonl")
    path.write_text(text)
    assert read_recipe(path, type(asking)).evaluation.task_data == tmp_path / "own.jsonl"


def test_mmlu_before_and_after_is_one_row_per_model(asking, data_dir, tmp_path):
    mmlu = replace(
        asking.evaluation, tasks=("mmlu",), task_data=data_dir / "mmlu", fewshot=0, limit=1
    )
    ran(replace(asking, graft=None, evaluation=mmlu), tmp_path / "run")
    lines = lines_of(tmp_path / "run")
    assert len(lines) == 2 * 58
    whole = [x for x in lines if x["task"] == "mmlu"]
    assert [x["questions"] for x in whole] == [57, 57]
    told = page(load_runs([tmp_path / "run"]))
    assert told.count("<td>mmlu</td>") == 2
    assert "mmlu_anatomy" not in told
