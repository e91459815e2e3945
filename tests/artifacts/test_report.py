"""The comparison and its page: figures that can be recomputed, one file without any request."""

import csv
import hashlib
import io
import json
import re
import shutil
import tomllib
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from conftest import word_text

from pomona.artifacts.report import write_report
from pomona.artifacts.run import RunDirectory
from pomona.artifacts.table import compare, load_runs, pairwise, table
from pomona.errors import PomonaError
from pomona.federation.clients import ClientData
from pomona.federation.evaluation import Evaluation
from pomona.federation.graft import Graft
from pomona.federation.local import LocalTraining
from pomona.federation.settings import FederateSettings, Finish
from pomona.federation.strategies import LocalOnly
from pomona.files import digest_of
from pomona.models.lora import LoRA
from pomona.pipelines.federate import federate
from pomona.recipe import build, dump


@pytest.fixture(scope="module")
def runs(moe_dir, rows_dir, tmp_path_factory):
    """FLEx with two seeds and local-only, finished."""
    out = tmp_path_factory.mktemp("runs")
    flex = FederateSettings(
        model=str(moe_dir),
        data=ClientData(train=rows_dir / "train.jsonl", test=rows_dir / "test.jsonl"),
        name="flex & <co>",
        rounds=2,
        max_length=96,
        adapter=LoRA(2, 4.0),
        graft=Graft(rank=2),
        local=LocalTraining(steps=1, batch=2),
        evaluation=Evaluation(every=1, answers=2, new_tokens=3),
    )
    every = [
        flex,
        replace(flex, seed=1),
        replace(flex, name="local-only", graft=None, strategy=LocalOnly()),
    ]
    for number, settings in enumerate(every):
        about = {"command": ["pomona"], "method": settings.name, "seed": settings.seed}
        with RunDirectory.open(out / str(number), dump(settings), about) as run:
            federate(settings, run)
    return [out / str(number) for number in range(3)]


def test_lines_are_the_base_and_one_per_method(runs):
    base, flex, alone = compare(load_runs(runs), "loss")
    assert [base.method, flex.method, alone.method] == ["base", "flex & <co>", "local-only"]
    assert flex.seeds == (0, 1)
    results = [json.loads((run / "results.json").read_text()) for run in runs]
    assert alone.mean.mean == pytest.approx(results[2]["personal"]["mean"]["loss"])
    assert base.mean.mean == pytest.approx(results[0]["base"]["mean"]["loss"])
    both = [r["personal"]["clients"]["pears"]["loss"] for r in results[:2]]
    assert flex.clients["pears"] == pytest.approx(sum(both) / 2)
    assert flex.mean.low < flex.mean.mean < flex.mean.high


def test_pairs_and_the_printed_table(runs):
    ((a, b, found),) = pairwise(load_runs(runs), "loss")
    lines = {line.method: line for line in compare(load_runs(runs), "loss")}
    assert found.difference.mean == pytest.approx(lines[a].mean.mean - lines[b].mean.mean)
    header, rows = table(load_runs(runs), "rouge_l")
    assert header == ["client", "base", "flex & <co>", "local-only"]
    assert [row[0] for row in rows] == [
        "apples",
        "pears",
        "plums",
        "mean",
        "95 % from",
        "95 % to",
        "worst client",
        "spread",
        "seeds",
    ]


class Tags(HTMLParser):
    VOID = ("meta", "br", "path", "use")

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_page_is_whole_and_asks_nobody(runs, tmp_path):
    write_report(runs, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text("utf-8")
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    names = [tag for tag, _ in tags.seen]
    assert names.count("svg") >= 5
    assert names.count("table") >= 6
    assert [a for tag, a in tags.seen if tag == "script"] == [{}]  # its own, from nowhere
    assert "link" not in names
    wanted = [a.get("src") or a.get("href") or a.get("xlink:href") for _, a in tags.seen]
    assert all(w.startswith(("#", "data:")) for w in wanted if w)
    assert not re.search(r"url\((?!#|\")", page)
    figures = [attributes for tag, attributes in tags.seen if tag == "figure"]
    for attributes in figures:
        cells = list(csv.reader(io.StringIO(attributes["data-csv"])))
        assert len(cells) > 1 and len({len(row) for row in cells}) == 1
    assert "flex &amp; &lt;co&gt;" in page
    assert "<co>" not in page
    for line in compare(load_runs(runs), "loss"):
        assert f"{line.mean.mean:.3f}" in page


def test_new_clients_have_everything_again(runs, tmp_path):
    """Beside a method that trained them all along, every figure recomputed from the answers."""
    pytest.importorskip(
        "lm_eval", reason="the `eval` extra is not installed: pip install pomona[eval]"
    )
    known = load_runs(runs)[0]
    recipe = tomllib.loads(known.recipe)
    settings = build(FederateSettings, recipe, tmp_path, "the recipe")
    stage = Finish(1, LocalTraining(steps=1, batch=2))
    (tmp_path / "elm.txt").write_text("\n\n".join(word_text(i, 60) for i in range(9)))
    asked = [
        {
            "question": word_text(i, 6),
            "choices": [word_text(9 * i + c, 2) for c in range(3)],
            "answer": 1,
        }
        for i in range(6)
    ]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(q) + "\n" for q in asked))
    evaluation = replace(
        settings.evaluation,
        forgetting=tmp_path / "elm.txt",
        windows=2,
        tasks=("multiple_choice",),
        task_data=tmp_path / "own.jsonl",
    )
    new = replace(settings, name="new", newcomers=("plums",), finish=stage, evaluation=evaluation)
    about = {"command": ["pomona"], "method": "new", "seed": 0}
    with RunDirectory.open(tmp_path / "new", dump(new), about) as run:
        federate(new, run)
    paths = [tmp_path / "new", runs[2]]
    found = [run.of(["plums"]) for run in load_runs(paths)]
    assert [run.newcomers for run in load_runs(paths)] == [["plums"], []]
    for own, whole in zip(found, load_runs(paths), strict=True):
        assert list(own.results["base"]["clients"]) == ["plums"]
        assert own.results["personal"]["mean"] == whole.results["personal"]["clients"]["plums"]
        assert {a["client"] for a in own.answers} == {"plums"}
        assert {m["client"] for m in own.metrics if "client" in m} == {"plums"}
        for line in (m for m in own.metrics if m["model"] == "communication"):
            assert set(line["sent"]) == set(line["received"]) == {"plums"}
            assert line["sent_bytes"] == line["sent"]["plums"]
        for model, routing in own.results["routing"].items():
            lines = [m for m in whole.metrics if (m["model"], m.get("client")) == (model, "plums")]
            counts_LE = np.array(lines[-1]["counts"], dtype=float)
            assert np.allclose(routing["load"], counts_LE / counts_LE.sum(1, keepdims=True))
        assert own.results["routing"].keys() == whole.results["routing"].keys() != set()
    write_report(paths, tmp_path / "report.html")
    _, heading, page = (tmp_path / "report.html").read_text("utf-8").partition("New clients</h2>")
    assert heading
    again, _, _ = page.partition("Communication</h2>")
    assert "Expert load" in again
    for line in (x for run in found[:1] for x in run.forgetting if x["model"] == "personal"):
        assert line["client"] == "plums"
    forgot, told = (
        page.partition(f"{h}</h2>")[2].partition("<h2>")[0]
        for h in ("Forgetting: loss of held-out text", "What was forgotten: tasks")
    )
    nats, tokens = (
        sum(x[key] for x in found[0].forgetting if x["model"] == "personal")
        for key in ("nats", "tokens")
    )
    assert f"<td>new, personal</td><td>{nats / tokens:.3f}</td>" in forgot
    (acc,) = [x for x in found[0].tasks if (x["model"], x["metric"]) == ("personal", "acc")]
    assert f"<td>new, personal</td><td>{acc['value']:.4f}</td>" in told
    received = page.partition("Communication</h2>")[2].partition("<h2>")[0]
    once = load_runs(paths)[0].metrics
    (line,) = [m for m in once if m["model"] == "communication" and "plums" in m["sent"]]
    assert f"<td>new</td><td>0</td><td>{line['sent']['plums'] / 1e6:.4g}</td><td>0</td>" in received
    for line in compare(found, "loss"):
        assert f"{line.mean.mean:.3f}" in page
    write_report(runs[2:], tmp_path / "none.html")
    assert "New clients" not in (tmp_path / "none.html").read_text("utf-8")


def test_an_answer_may_hold_any_line_separator(runs, tmp_path):
    """U+2028 and its like end no line of a file of JSON lines."""
    copy = tmp_path / "run"
    shutil.copytree(runs[0], copy)
    lines = [json.loads(line) for line in (copy / "answers.jsonl").read_bytes().splitlines()]
    first = next(line for line in lines if line["reference"] is not None)
    first["reference"] = "one\u2028two\u2029three\u0085four\x0cfive"
    written = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
    results = (copy / "results.json").read_text("utf-8")
    before = hashlib.sha256((copy / "answers.jsonl").read_bytes()).hexdigest()
    assert before in results
    (copy / "answers.jsonl").write_bytes(written)
    after = hashlib.sha256(written).hexdigest()
    (copy / "results.json").write_text(results.replace(before, after), encoding="utf-8")
    (found,) = load_runs([copy])
    assert len(found.answers) == len(lines)
    write_report([copy], tmp_path / "report.html")


def test_the_same_runs_give_the_same_page(runs, tmp_path):
    write_report(runs[1:], tmp_path / "a.html")
    write_report(runs[1:], tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_what_cannot_be_reported_is_named(runs, tmp_path):
    with pytest.raises(PomonaError, match="is no run directory"):
        write_report([tmp_path], tmp_path / "r.html")
    (tmp_path / "half").mkdir()
    (tmp_path / "half/run.json").write_text("{}")
    with pytest.raises(PomonaError, match="is not finished; run its command again"):
        write_report([tmp_path / "half"], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def altered(run, path, recipe=("", ""), **about):
    """Copy a finished run, as if its recipe and run.json had said something else from the start."""
    shutil.copytree(run, path)
    text = (path / "recipe.toml").read_text("utf-8")
    assert recipe[0] in text
    (path / "recipe.toml").write_text(text.replace(*recipe), encoding="utf-8")
    told = json.loads((path / "run.json").read_text()) | about
    (path / "run.json").write_text(json.dumps(told))
    results = json.loads((path / "results.json").read_text())
    results["files"]["recipe.toml"] = digest_of(path / "recipe.toml")
    (path / "results.json").write_text(json.dumps(results))
    return path


def refused(runs, tmp_path):
    with pytest.raises(PomonaError) as caught:
        write_report(runs, tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()
    assert str(runs[0]) in str(caught.value)
    return str(caught.value)


def test_runs_of_different_models_are_not_compared(runs, moe_dir, tmp_path):
    other = altered(runs[2], tmp_path / "other", (str(moe_dir), "/another/model"), method="other")
    message = refused([runs[0], other], tmp_path)
    assert f"are of different models ({moe_dir}, /another/model); compare runs of one" in message


def test_one_run_given_twice_is_not_two(runs, tmp_path):
    assert 'are both "flex & <co>" with seed 0; give each run once' in refused(
        [runs[0], runs[0]], tmp_path
    )


def test_one_method_with_other_settings_is_another_method(runs, tmp_path):
    other = altered(runs[1], tmp_path / "other", ("steps = 1", "steps = 2"))
    message = refused([runs[0], other], tmp_path)
    assert 'are both called "flex & <co>" and differ in local; give them different names' in message
    renamed = altered(runs[1], tmp_path / "renamed", ("steps = 1", "steps = 2"), method="longer")
    write_report([runs[0], renamed], tmp_path / "r.html")


def test_runs_of_other_clients_are_not_compared(runs, tmp_path):
    other = altered(runs[2], tmp_path / "other", method="other")
    text = (other / "results.json").read_text().replace('"plums"', '"kiwis"')
    (other / "results.json").write_text(text)
    assert "have different clients; report runs of one federation" in refused(
        [runs[0], other], tmp_path
    )


def test_a_run_of_another_version_is_told(runs, tmp_path):
    older = altered(runs[0], tmp_path / "older", format=1)
    with pytest.raises(PomonaError, match=r"older was written by Pomona .* in format"):
        write_report([older], tmp_path / "r.html")
