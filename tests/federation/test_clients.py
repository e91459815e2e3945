"""Where clients' rows come from: ready files, dealt files, held-out rows, one central test set."""

import json
from collections import Counter
from dataclasses import replace

import pyarrow as pa
import pytest
from pyarrow import parquet

from pomona.data.formats import Mapped
from pomona.data.rows import Row, read_rows
from pomona.errors import PomonaError
from pomona.federation.clients import ClientData
from pomona.federation.partition import ByCategory, Dirichlet, EvenDirichlet, SomeCategories


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def qa(number, category):
    return {"question": f"q{number}", "answer": "a", "category": category}


@pytest.fixture
def dealt(tmp_path):
    """40 train and 20 test rows of four categories, sorted by category."""
    kinds = sorted("abcd" * 10)
    train = write(tmp_path / "train.jsonl", [qa(i, k) for i, k in enumerate(kinds)])
    test = write(tmp_path / "test.jsonl", [qa(100 + i, k) for i, k in enumerate(kinds[::2])])
    return ClientData(train=train, test=test)


def test_ready_files_per_client(tmp_path):
    for name in ("b site", "ä"):
        for split in ("train", "test"):
            (tmp_path / f"{name}.{split}.jsonl").write_text(
                f'{{"question": "{name}", "answer": "{split}"}}\n', encoding="utf-8"
            )
    clients = ClientData(folder=tmp_path).load(0)
    assert list(clients) == ["b site", "ä"]
    assert clients["ä"].test == [Row("ä", "", "test")]
    (tmp_path / "ä.test.jsonl").unlink()
    with pytest.raises(
        PomonaError, match=r'client "ä" has no test rows: cannot read .*ä.test.jsonl, '
    ):
        ClientData(folder=tmp_path).load(0)
    with pytest.raises(PomonaError, match="either folder"):
        ClientData()
    with pytest.raises(PomonaError, match="no test file"):
        ClientData(train=tmp_path)
    with pytest.raises(PomonaError, match="is not a folder"):
        ClientData(folder=tmp_path / "x").load(0)


@pytest.mark.parametrize("name", [".hidden", "a/b", "", "x:y"])
def test_names_that_cannot_be_folders_are_refused(name, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "q", "answer": "a", "category": name}))
    with pytest.raises(PomonaError, match="cannot be a folder name"):
        ClientData(train=path, test=path).load(0)


def test_ready_files_of_every_kind_side_by_side(tmp_path):
    (tmp_path / "a.train.csv").write_text("question,answer\nred?,yes\n")
    (tmp_path / "a.test.json").write_text('[{"instruction": "blue?", "output": "no"}]')
    write(tmp_path / "b.v2.train.jsonl", [{"prompt": "x", "completion": "y"}])
    table = pa.Table.from_pylist([{"question": "z", "answer": "w"}])
    parquet.write_table(table, tmp_path / "b.v2.test.parquet")
    (tmp_path / "a.train.txt").write_text("notes, no rows")
    clients = ClientData(folder=tmp_path).load(0)
    assert list(clients) == ["a", "b.v2"]
    assert clients["a"].train == [Row("red?", "", "yes")]
    assert clients["a"].test == [Row("blue?", "", "no")]
    assert clients["b.v2"].test == [Row("z", "", "w")]
    (tmp_path / "a.train.jsonl").write_text("{}")
    with pytest.raises(PomonaError, match=r'"a" has two files, a.train.csv and a.train.jsonl, in '):
        ClientData(folder=tmp_path).load(0)


def test_ready_files_with_fields_of_their_own(tmp_path):
    for split in ("train", "test"):
        write(tmp_path / f"a.{split}.jsonl", [{"q": "x", "a": "y", "k": 3}])
    data = ClientData(folder=tmp_path, format=Mapped("q", "", "a", "k"))
    assert data.load(0)["a"].train == [Row("x", "", "y", "3")]


def test_a_central_test_set_is_the_same_for_all_clients_and_seeds(dealt):
    for partition in (ByCategory(), Dirichlet(3, 0.3), EvenDirichlet(4), SomeCategories(4, 2)):
        data = replace(dealt, partition=partition, central=True, test_rows=2)
        clients, others = data.load(0), data.load(1)
        tests = [own.test for own in (*clients.values(), *others.values())]
        assert all(test == tests[0] for test in tests)
        assert Counter(row.category for row in tests[0]) == dict.fromkeys("abcd", 2)
        assert [r.category for r in tests[0]] != sorted(r.category for r in tests[0]), "mixed"
        own = partition(read_rows(dealt.train), (), 0)[0]
        assert {name: held.train for name, held in clients.items()} == own


def test_a_central_test_set_of_ready_files_is_everybody_s(tmp_path):
    for name in "ab":
        write(tmp_path / f"{name}.train.jsonl", [qa(0, name)])
        write(tmp_path / f"{name}.test.jsonl", [qa(i, name) for i in range(5)])
    clients = ClientData(folder=tmp_path, central=True, test_rows=3).load(0)
    assert clients["a"].test == clients["b"].test
    assert Counter(row.category for row in clients["a"].test) == {"a": 3, "b": 3}
    own = ClientData(folder=tmp_path, test_rows=3).load(0)
    assert Counter(row.category for row in own["a"].test) == {"a": 3}


def test_test_rows_thins_every_category_before_dealing(dealt):
    clients = replace(dealt, test_rows=3).load(0)
    assert [len(own.test) for own in clients.values()] == [3] * 4
    whole = replace(dealt, test_rows=0).load(0)
    assert {name: own.test for name, own in whole.items()} == {
        k: [r for r in read_rows(dealt.test) if r.category == k] for k in "abcd"
    }


def test_held_out_rows_are_kept_from_training(dealt):
    clients = ClientData(train=dealt.train, held_out=4).load(0)
    again = ClientData(train=dealt.train, held_out=4).load(7)
    for name, own in clients.items():
        assert (len(own.train), len(own.test)) == (6, 4)
        assert not {r.instruction for r in own.train} & {r.instruction for r in own.test}
        assert again[name].test == own.test, "seeds share their test rows"


def test_the_published_setting_with_its_central_test(data_dir):
    """FLEx: Dirichlet over ten clients of 1,000 rows, a central test with 25 rows per category."""
    data = ClientData(
        train=data_dir / "dolly-15k" / "train.jsonl",
        test=data_dir / "dolly-15k" / "test.jsonl",
        partition=EvenDirichlet(10, 0.5, rows=1000),
        central=True,
        test_rows=25,
    )
    clients = data.load(0)
    assert [len(own.train) for own in clients.values()] == [1000] * 10
    assert set(Counter(r.category for r in clients["client-3"].test).values()) == {25}
    assert len(clients["client-3"].test) == 200


def test_rows_are_dealt_by_any_field(data_dir):
    data = ClientData(
        train=data_dir / "medquad" / "train.jsonl",
        test=data_dir / "medquad" / "test.jsonl",
        category="qtype",
        partition=ByCategory(("information", "symptoms", "treatment")),
    )
    clients = data.load(0)
    assert list(clients) == ["information", "symptoms", "treatment"]
    assert {r.category for r in clients["symptoms"].train} == {"symptoms"}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"held_out": -1}, "held_out -1 is negative"),
        ({"test_rows": -1}, "test_rows -1 is negative"),
        ({"held_out": 3}, "has test rows and held_out; leave one of them out"),
        ({"test": None}, "no test file; .* or say in held_out"),
        ({"train": None}, "no train file"),
        ({"test": None, "held_out": 10}, 'has 10 rows of "a" and held_out takes 10 of each'),
        ({"category": "topic"}, 'train.jsonl:1: the field "topic" is missing'),
        ({"partition": Dirichlet(3, minimum=50)}, "none of 1000 draws"),
    ],
)
def test_what_does_not_fit_is_refused(dealt, fields, says):
    with pytest.raises(PomonaError, match=says):
        replace(dealt, **fields).load(0)
