"""Who holds what: counts that add up, the same in the table, the picture, the results and the report."""

import csv
import json
import re
from collections import Counter
from dataclasses import replace

import pytest

from pomona.artifacts.holdings import holdings_map, write_holdings
from pomona.artifacts.report import write_report
from pomona.artifacts.run import RunDirectory
from pomona.data.rows import Row
from pomona.errors import PomonaError
from pomona.federation.clients import ClientData, ClientRows
from pomona.federation.evaluation import Evaluation
from pomona.federation.holdings import holdings_of
from pomona.federation.local import LocalTraining
from pomona.federation.partition import EvenDirichlet
from pomona.federation.settings import FederateSettings
from pomona.models.lora import LoRA
from pomona.pipelines.federate import federate
from pomona.recipe import dump


def row(number, category):
    return Row(f"ask {number}", "", f"say {number}", category, where=f"x.jsonl:{number}")


CLIENTS = {
    "amber": ClientRows([row(i, "ab"[i % 2]) for i in range(7)], [row(50, "c"), row(3, "b")]),
    "birch & <co>": ClientRows([row(20, "c")], [row(60, "a")]),
}


def test_counts_by_hand():
    held = holdings_of(CLIENTS)
    assert held.categories == ["a", "b", "c"]
    assert held.train == {"amber": [4, 3, 0], "birch & <co>": [0, 0, 1]}
    assert held.test == {"amber": [0, 1, 1], "birch & <co>": [1, 0, 0]}
    assert held.duplicates.clients["amber"].same == held.duplicates.clients["amber"].own == 1
    assert held.consistent()
    assert not replace(held, categories=["a", "b"]).consistent()
    assert not replace(held, test={"amber": [0, 1, 1]}).consistent()


def test_table_and_picture(tmp_path):
    held = holdings_of(CLIENTS)
    for name in ("one", "two"):
        write_holdings(tmp_path / name, held)
    for file in ("holdings.csv", "holdings.svg"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    with (tmp_path / "one/holdings.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 2 * 2 * 3
    counted = {(x["client"], x["split"], x["category"]): int(x["rows"]) for x in lines}
    for name, own in CLIENTS.items():
        for split in ("train", "test"):
            held_rows = Counter(r.category for r in getattr(own, split))
            assert {k: counted[name, split, k] for k in "abc"} == {k: held_rows[k] for k in "abc"}
    words = re.findall(r"<text[^>]*>([^<]+)</text>", (tmp_path / "one/holdings.svg").read_text())
    assert {"amber (7)", "birch &amp; &lt;co&gt; (1)", "a", "b", "c", "train rows"} <= set(words)
    assert {"4", "3", "1"} <= set(words)


def test_many_clients_are_a_map_of_the_same_size_with_some_of_their_names():
    drawn = [
        holdings_map(
            holdings_of({f"c{i}": ClientRows([row(i, "a")], [row(i, "b")]) for i in range(count)})
        )
        for count in (1000, 2000)
    ]
    heights = [re.search(r'height="([^"]+)"', svg)[1] for svg in drawn]
    assert heights[0] == heights[1]
    for svg in drawn:
        assert svg.count(" (1)<") == 40


def test_many_categories_are_drawn_together_and_none_is_named():
    rows = [row(i, f"k{i % 30:02d}" if i % 31 else "") for i in range(300)]
    picture = holdings_map(holdings_of({"one": ClientRows(rows, rows[:1])}))
    assert "8 others" in picture
    alone = holdings_map(holdings_of({"one": ClientRows([row(1, "")], [row(2, "")])}))
    assert "no category" in alone


@pytest.fixture(scope="module")
def runs(moe_dir, rows_dir, tmp_path_factory):
    """Two seeds whose clients hold other rows; the test rows repeat some train rows."""
    folder = tmp_path_factory.mktemp("held")
    train = (rows_dir / "train.jsonl").read_text().splitlines()
    test = (rows_dir / "test.jsonl").read_text().splitlines()
    (folder / "test.jsonl").write_text("\n".join([*test, *train[:3]]) + "\n")
    settings = FederateSettings(
        model=str(moe_dir),
        data=ClientData(
            train=rows_dir / "train.jsonl",
            test=folder / "test.jsonl",
            partition=EvenDirichlet(3, 0.5),
        ),
        rounds=1,
        max_length=96,
        adapter=LoRA(2, 4.0),
        local=LocalTraining(steps=1, batch=2),
        evaluation=Evaluation(every=1, rows=2, answers=1, new_tokens=2),
    )
    told = []
    for seed in range(2):
        about = {"command": ["pomona"], "method": "flex", "seed": seed}
        seeded = replace(settings, seed=seed)
        with RunDirectory.open(folder / str(seed), dump(seeded), about) as run:
            federate(seeded, run, tell=told.append)
    return settings, [folder / "0", folder / "1"], told


def test_results_tell_what_the_clients_hold(runs):
    settings, folders, told = runs
    for seed, folder in enumerate(folders):
        data = json.loads((folder / "results.json").read_text())["data"]
        clients = settings.data.load(seed)
        for name, own in clients.items():
            held = Counter(r.category for r in own.train)
            assert data["train"][name] == [held[k] for k in data["categories"]]
        assert data["duplicates"]["total"]["same"] == 3
        assert sum(own["same"] for own in data["duplicates"]["clients"].values()) == 3
        example = data["duplicates"]["example"]
        assert re.fullmatch(r"test.jsonl:1[345]", example["test"])
        assert example["train"] in {f"train.jsonl:{i}" for i in (1, 2, 3)}
        assert told[seed].startswith("duplicates: 3 of 15 test rows are train rows too (client-")
        assert f"for example {example['test']} is {example['train']} of client-" in told[seed]
        assert (folder / "holdings.svg").read_text().startswith("<svg")


def test_the_report_draws_each_deal_once_and_names_its_runs(runs, tmp_path):
    _, folders, told = runs
    write_report(folders, tmp_path / "two.html")
    page = (tmp_path / "two.html").read_text("utf-8")
    assert page.count("<h2>Who holds what</h2>") == 1
    assert "Train rows per client and category (flex, seed 0). From results.json." in page
    assert "Train rows per client and category (flex, seed 1). From results.json." in page
    assert told[0][1:] in page
    write_report(folders[:1], tmp_path / "one.html")
    one = (tmp_path / "one.html").read_text("utf-8")
    assert one.count("Train rows per client and category. From results.json.</figcaption>") == 1


@pytest.mark.parametrize("change", ["count", "client", "type"])
def test_counts_that_are_not_whole_are_noticed(runs, tmp_path, change):
    _, folders, _ = runs
    path = folders[0] / "results.json"
    whole = path.read_text()
    results = json.loads(whole)
    data = results["data"]
    if change == "count":
        data["train"]["client-0"].pop()
    if change == "client":
        del data["test"]["client-0"]
    if change == "type":
        data["duplicates"]["total"]["same"] = "many"
    try:
        path.write_text(json.dumps(results))
        with pytest.raises(PomonaError, match=r"results.json is damaged or cut off \(data"):
            write_report(folders[:1], tmp_path / "x.html")
    finally:
        path.write_text(whole)
