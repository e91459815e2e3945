"""What the report says of several methods and seeds, recomputed from the files it names."""

import html
import json
import re
import shutil
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from conftest import word_text
from scipy import stats

from pomona.artifacts.report import page, write_report
from pomona.artifacts.rounds import (
    client_series,
    drift_by_client,
    drift_by_round,
    entropy_by_round,
    load_by_client,
    mean_series,
    openness_by_round,
)
from pomona.artifacts.run import RunDirectory
from pomona.artifacts.sections.cost import cost
from pomona.artifacts.table import compare, differences, load_runs, measured, pairwise, table
from pomona.errors import PomonaError
from pomona.evaluation.significance import holm
from pomona.federation.clients import ClientData
from pomona.federation.evaluation import Evaluation
from pomona.federation.graft import Graft
from pomona.federation.local import LocalTraining
from pomona.federation.partition import Dirichlet
from pomona.federation.settings import FederateSettings
from pomona.federation.strategies import LocalOnly
from pomona.files import digest_of
from pomona.models.lora import LoRA
from pomona.pipelines.federate import federate
from pomona.recipe import dump


def finished(settings, path):
    about = {"command": ["pomona"], "method": settings.name, "seed": settings.seed}
    with RunDirectory.open(path, dump(settings), about) as run:
        federate(settings, run)
    return path


@pytest.fixture(scope="module")
def settings(moe_dir, rows_dir, tmp_path_factory):
    text = tmp_path_factory.mktemp("text")
    for name, seed in (("ash", 1), ("elm", 2)):
        (text / f"{name}.txt").write_text(
            "\n\n".join(word_text(40 * seed + i, 60) for i in range(9))
        )
    return FederateSettings(
        model=str(moe_dir),
        data=ClientData(train=rows_dir / "train.jsonl", test=rows_dir / "test.jsonl"),
        name="flex",
        rounds=2,
        max_length=64,
        adapter=LoRA(2, 4.0),
        graft=Graft(rank=2),
        local=LocalTraining(steps=2, batch=2, learning_rate=0.03),
        evaluation=Evaluation(every=1, answers=2, new_tokens=3, forgetting=text, windows=4),
    )


@pytest.fixture(scope="module")
def runs(settings, tmp_path_factory):
    """Three seeds of FLEx and of local-only, one of FedAvg with its speed."""
    out = tmp_path_factory.mktemp("runs")
    alone = replace(settings, name="local-only", graft=None, strategy=LocalOnly())
    timed = replace(settings.evaluation, speed=True)
    fedavg = replace(settings, name="fedavg", graft=None, evaluation=timed)
    every = [replace(s, seed=seed) for s in (settings, alone) for seed in range(3)]
    return [finished(s, out / f"{s.name}-{s.seed}") for s in [*every, fedavg]]


def file_of(run, name):
    return [json.loads(line) for line in (run / name).read_text("utf-8").splitlines()]


@cache
def page_of(*runs, baseline=None):
    return page(load_runs(runs), baseline)


def text_of(runs, baseline=None):
    """The page without its plots, a line per row of a table."""
    return plain(page_of(*runs, baseline=baseline))


def plain(told):
    told = re.sub(r"<svg.*?</svg>|<style>.*?</style>", "", told, flags=re.S)
    told = told.replace("</tr>", "\n").replace("</td>", "|").replace("</th>", "|")
    return html.unescape(re.sub(r"<[^>]+>", "", re.sub(r"</(h2|p|figcaption)>", "\n", told)))


def by_hand(run, model, client):
    own = [a for a in file_of(run, "answers.jsonl") if (a["client"], a["model"]) == (client, model)]
    return sum(a["nats"] for a in own) / sum(a["tokens"] for a in own)


CLIENTS = ("apples", "pears", "plums")


def test_worst_spread_and_seeds_are_those_of_the_rows(runs):
    _, flex, *_ = compare(load_runs(runs), "loss")
    table_SC = np.array([[by_hand(run, "personal", c) for c in CLIENTS] for run in runs[:3]])
    assert [flex.clients[c] for c in CLIENTS] == pytest.approx(table_SC.mean(0))
    assert flex.worst == pytest.approx(table_SC.mean(0).max())
    assert flex.spread == pytest.approx(table_SC.mean(0).std())
    means_S = table_SC.mean(1)
    low, high = stats.t.interval(0.95, 2, means_S.mean(), stats.sem(means_S))
    assert flex.over_seeds is not None
    assert (flex.over_seeds.low, flex.over_seeds.high) == pytest.approx((low, high))


def test_perplexity_is_of_each_client_and_the_worst_of_rouge_is_the_least(runs):
    loaded = load_runs(runs)
    losses, perplexities = (compare(loaded, m)[1] for m in ("loss", "perplexity"))
    for client in CLIENTS:
        assert perplexities.clients[client] == pytest.approx(np.exp(losses.clients[client]))
    rouge = compare(loaded, "rouge_l")[-1]
    assert rouge.worst == min(rouge.clients.values())
    results = json.loads((runs[-1] / "results.json").read_text())["shared"]
    exact = compare(loaded, "exact_match")[-1]
    assert {c: own["exact_match"] for c, own in results["clients"].items()} == exact.clients


def test_two_seeds_have_no_interval_over_seeds(runs):
    _, flex = compare(load_runs(runs[:2]), "loss")
    assert flex.over_seeds is None
    assert len(flex.seeds) == 2


def test_differences_from_a_baseline_are_paired_and_corrected(runs):
    found = differences(load_runs(runs), "loss", "local-only")
    assert [(d.first, d.second) for d in found] == [
        ("flex", "local-only"),
        ("fedavg", "local-only"),
    ]
    assert [d.corrected for d in found] == pytest.approx(holm([d.rows.p_value for d in found]))
    flex, fedavg = found
    means_MS = np.array(
        [
            [np.mean([by_hand(r, "personal", c) for c in CLIENTS]) for r in runs[i : i + 3]]
            for i in (0, 3)
        ]
    )
    assert flex.seeds is not None
    assert flex.seeds.p_value == pytest.approx(stats.ttest_rel(*means_MS).pvalue)
    assert flex.rows.difference.mean == pytest.approx(np.subtract(*means_MS).mean())
    assert (fedavg.seeds, fedavg.corrected_seeds) == (None, None)
    assert len(pairwise(load_runs(runs), "loss")) == 3


def test_the_base_may_be_the_baseline_and_an_unknown_one_is_named(runs):
    found = differences(load_runs(runs), "loss", "base")
    assert [d.second for d in found] == ["base"] * 3
    lines = {line.method: line.mean.mean for line in compare(load_runs(runs), "loss")}
    for d in found:
        assert d.rows.difference.mean == pytest.approx(lines[d.first] - lines["base"])
    with pytest.raises(
        PomonaError, match=r'of the method "flexx"; the methods here are "base", "flex"'
    ):
        page(load_runs(runs), "flexx")


def test_the_order_in_which_runs_are_given_changes_nothing_but_the_order_of_lines(runs):
    given, turned = load_runs(runs), load_runs(runs[::-1])
    ours = {d.first + d.second: d for d in differences(given, "loss", "base")}
    theirs = {d.first + d.second: d for d in differences(turned, "loss", "base")}
    assert ours == theirs


def test_seeds_that_dealt_other_rows_are_paired_seed_by_seed(settings, tmp_path):
    """Dirichlet: every seed has clients and rows of its own; only equal seeds share them."""
    data = replace(settings.data, partition=Dirichlet(clients=2, alpha=5.0))
    evaluation = Evaluation(every=1, answers=0, new_tokens=3)
    common = replace(settings, data=data, evaluation=evaluation, rounds=1)
    alone = replace(common, name="local-only", graft=None, strategy=LocalOnly())
    runs = [
        finished(replace(s, seed=seed), tmp_path / f"{s.name}-{seed}")
        for s, seeds in ((common, (0, 1)), (alone, (2, 1, 0)))
        for seed in seeds
    ]
    loaded = load_runs(runs)
    assert measured(loaded) == ["loss", "perplexity"]
    (found,) = differences(loaded, "loss")
    (same,) = differences(load_runs([runs[0], runs[1], runs[3], runs[4]]), "loss")
    assert found.rows == same.rows
    assert loaded[0].test_rows != loaded[1].test_rows
    assert differences(load_runs([runs[0], runs[2]]), "loss") == []
    told = text_of(runs)
    assert "ROUGE" not in told
    assert "nan" not in told.lower().replace("finance", "")


def test_drift_is_the_total_variation_of_recorded_loads(runs):
    found = drift_by_round(load_runs(runs[:3]))
    assert list(found) == [1, 2]
    for round_, drift_L in found.items():
        every = []
        for run in runs[:3]:
            lines = file_of(run, "metrics.jsonl")
            base = {m["client"]: m["counts"] for m in lines if m["model"] == "base"}
            for m in lines:
                if m["model"] == "personal" and m["round"] == round_:
                    p, q = (
                        np.array(c) / np.sum(c, 1, keepdims=True)
                        for c in (m["counts"], base[m["client"]])
                    )
                    every.append(np.abs(p - q).sum(1) / 2)
        assert len(every) == 9
        assert drift_L == pytest.approx(np.mean(every, axis=0))
    assert found[2].max() > 0


def test_entropy_and_load_per_client_are_those_of_the_counts(runs):
    run = load_runs(runs[:1])[0]
    lines = [m for m in file_of(runs[0], "metrics.jsonl") if "counts" in m]
    entropy = entropy_by_round([run])
    assert list(entropy) == [0, 1, 2]
    for round_, found_L in entropy.items():
        model = "personal" if round_ else "base"
        counts = [m["counts"] for m in lines if (m["model"], m["round"]) == (model, round_)]
        load_LE = np.sum(counts, axis=0) / np.sum(counts, axis=(0, 2))[:, None]
        expected = stats.entropy(load_LE, axis=1) / np.log(load_LE.shape[1])
        assert found_L == pytest.approx(expected)
    assert entropy[2] == pytest.approx(run.results["routing"]["personal"]["entropy"])
    loads, drifts = load_by_client(run, "personal"), drift_by_client(load_runs(runs[:3]))
    assert list(loads) == list(drifts) == list(CLIENTS)
    for client in CLIENTS:
        own = {m["model"]: np.array(m["counts"]) for m in lines if m["client"] == client}
        share = {model: n / n.sum(1, keepdims=True) for model, n in own.items()}
        assert loads[client].share_LE.numpy() == pytest.approx(share["personal"])
    by_client = np.mean(list(drifts.values()), axis=0)
    assert by_client == pytest.approx(drift_by_round(load_runs(runs[:3]))[2])
    assert drifts["apples"] != pytest.approx(drifts["pears"])


def test_the_last_round_is_what_the_results_say(runs):
    run = load_runs(runs[:1])[0]
    last = [m for m in run.metrics if m["model"] == "personal" and m["round"] == 2]
    openness = {m["client"]: m["openness"] for m in last}
    assert openness == run.results["gate_openness"]
    mean = openness_by_round([run])[2]
    assert mean == pytest.approx(np.mean(list(openness.values()), axis=0))
    assert {c: own[2] for c, own in client_series(run, "personal").items()} == {
        c: own["loss"] for c, own in run.results["personal"]["clients"].items()
    }
    counts = np.sum([m["counts"] for m in last], axis=0)
    assert run.results["routing"]["personal"]["load"] == pytest.approx(
        counts / counts.sum(1)[:, None]
    )


def test_a_mean_of_series_takes_the_rounds_that_are_there():
    assert mean_series([{1: 2.0, 2: 4.0}, {2: 6.0, 4: 1.0}]) == {1: 2.0, 2: 5.0, 4: 1.0}


def test_the_page_has_every_subject_and_names_its_files(runs):
    told = text_of(runs, baseline="local-only")
    for heading in (
        "Answer loss, nats per token",
        "Perplexity of answers",
        "ROUGE-L",
        "Exact match",
        "Convergence",
        "Experts",
        "Forgetting",
        "Communication",
        "FLOPs per token",
        "Speed",
    ):
        assert re.search(f"^{heading}", told, re.M), heading
    for file in (
        "answers.jsonl",
        "metrics.jsonl",
        "results.json",
        "forgetting.jsonl",
        "speed.json",
    ):
        assert f"rom {file}" in told
    assert "flex − local-only" in told
    assert "flex − fedavg" not in told
    plots = {
        "answers, but perplexity": 3,
        "who holds what": 1,
        "convergence": 1,
        "drift and entropy by round": 2,
        "expert load of the base and of every method": 4,
        "every client's expert load and drift": 2 * 3,
        "gates": 2,
        "messages of those that send": 2,
    }
    assert page_of(*runs, baseline="local-only").count("<svg") == sum(plots.values())


def cells(told, start):
    (line,) = [line for line in told.splitlines() if line.startswith(f"{start}|")][:1]
    return line.split("|")


def test_forgetting_on_the_page_is_that_of_the_file(runs):
    told = text_of(runs, baseline="local-only").partition("Forgetting")[2]
    lines = [x for run in runs[:3] for x in file_of(run, "forgetting.jsonl")]

    def loss(model, domain, client=None):
        own = [
            x
            for x in lines
            if x["model"] == model and x["domain"] == domain and client in (None, x["client"])
        ]
        return sum(x["nats"] for x in own) / sum(x["tokens"] for x in own)

    base, own = (np.mean([loss(m, d) for d in ("ash", "elm")]) for m in ("base", "personal"))
    worst = max(np.mean([loss("personal", d, c) for d in ("ash", "elm")]) for c in CLIENTS)
    found = cells(told, "flex, personal")
    assert [float(x) for x in found[1:6]] == pytest.approx(
        [loss("personal", "ash"), loss("personal", "elm"), own, worst, own - base], abs=6e-4
    )
    assert float(cells(told, "base")[3]) == pytest.approx(base, abs=6e-4)


def test_communication_on_the_page_is_that_of_the_metrics(runs):
    told = text_of(runs, baseline="local-only").partition("Communication")[2]
    lines = [m for m in file_of(runs[0], "metrics.jsonl") if m["model"] == "communication"]
    sent = sum(m["sent_bytes"] for m in lines)
    cost = json.loads((runs[0] / "results.json").read_text())["cost"]["bytes"]
    found = cells(told, "flex")
    assert float(found[2]) == pytest.approx(sent / 1e6, rel=1e-3)
    assert float(found[4]) == pytest.approx(sent / 6e6, rel=1e-3)
    for cell, what in zip(found[5:7], ("all_parameters", "lora_everywhere"), strict=True):
        assert float(cell.removesuffix(" %")) == pytest.approx(
            100 * sent / 6 / cost[what], rel=5e-3
        )
    assert cells(told, "local-only")[5:7] == ["0 %", "0 %"]


def test_messages_of_pooled_rows_are_those_of_whoever_trains(settings, tmp_path):
    """Clients of the test rows send nothing themselves, and that is no zero."""
    evaluation = Evaluation(every=1, rows=1, answers=0, new_tokens=3)
    pooled = replace(settings, name="pooled", pooled=True, rounds=1, evaluation=evaluation)
    path = finished(pooled, tmp_path / "pooled")
    told = text_of([path]).partition("Communication")[2]
    (line,) = [m for m in file_of(path, "metrics.jsonl") if m["model"] == "communication"]
    assert cells(told, "to and from")[1:] == ["everyone", ""]
    assert cells(told, "pooled, sent")[1:] == [f"{line['sent']['everyone'] / 1e6:.4g}", ""]
    (run,) = load_runs([path])
    assert cells(plain(cost([run.of(["pears"])])), "pooled")[2:4] == ["–", "–"]


def aged(run, path):
    """A run as it was written before all of this was recorded."""
    shutil.copytree(run, path)
    (path / "forgetting.jsonl").unlink()
    new = {"counts", "openness", "sent", "received", "exact_match"}
    for name in ("metrics.jsonl", "answers.jsonl"):
        lines = [{k: v for k, v in x.items() if k not in new} for x in file_of(run, name)]
        (path / name).write_text("".join(json.dumps(x) + "\n" for x in lines), encoding="utf-8")
    results = json.loads((path / "results.json").read_text())
    results = {k: v for k, v in results.items() if k != "cost"}
    for model in ("base", "shared", "personal"):
        for own in [results[model]["mean"], *results[model]["clients"].values()]:
            del own["exact_match"]
    del results["files"]["forgetting.jsonl"]
    for name in ("metrics.jsonl", "answers.jsonl"):
        results["files"][name] = digest_of(path / name)
    (path / "results.json").write_text(json.dumps(results))
    return path


def test_a_run_of_before_is_still_read(runs, tmp_path):
    old = aged(runs[0], tmp_path / "old")
    told = text_of([old])
    assert compare(load_runs([old]), "exact_match") == compare(load_runs(runs[:1]), "exact_match")
    assert "Communication" in told
    assert "Forgetting" not in told
    assert "FLOPs" not in told
    text_of([old, runs[3]], baseline="local-only")


def test_other_rows_with_answers_of_the_same_length_are_not_taken_for_the_same(runs):
    one, _, _, other, *_ = load_runs(runs)
    strange = replace(other, test_rows=dict.fromkeys(CLIENTS, "another digest"))
    assert len(differences([one, other], "loss")) == 1
    assert differences([one, strange], "loss") == []


@pytest.mark.parametrize("name", ["forgetting.jsonl", "speed.json"])
def test_a_damaged_file_that_is_not_always_there_is_named(runs, tmp_path, name):
    path = shutil.copytree(runs[-1], tmp_path / "run")
    for content in (b"", b"[]", b'{"client": "apples"}', b"\xff"):
        (path / name).write_bytes(content)
        with pytest.raises(PomonaError, match=name):
            write_report([path], tmp_path / "r.html")


def test_the_terminal_has_worst_spread_and_seeds(runs):
    header, rows = table(load_runs(runs), "loss")
    assert header == ["client", "base", "flex", "local-only", "fedavg"]
    told = {row[0]: row[1:] for row in rows}
    lines = compare(load_runs(runs), "loss")
    assert told["worst client"] == [f"{line.worst:.3f}" for line in lines]
    assert told["spread"] == [f"{line.spread:.3f}" for line in lines]
    assert told["seeds"] == ["", "3", "3", "1"]
    assert told["95 % over seeds from"][0] == told["95 % over seeds from"][3] == "–"
