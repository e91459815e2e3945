"""Who holds which rows and who takes part: functions of their seeds."""

import pytest

from pomona.data.rows import Row
from pomona.errors import PomonaError
from pomona.federation.clients import ClientData
from pomona.federation.partition import IID, PARTITIONS, ByCategory, Dirichlet
from pomona.federation.sampling import batches, participants

ROWS = [Row(str(i), "", "r", "abcd"[i % 4]) for i in range(200)]


def ids(dealt):
    return sorted(int(row.instruction) for rows in dealt.values() for row in rows)


@pytest.mark.parametrize("partition", [ByCategory(), IID(7), Dirichlet(5, 0.3)])
def test_every_row_is_dealt_once_and_seeds_decide(partition):
    assert type(partition) in PARTITIONS.values()
    dealt = partition(ROWS, 0, "train")
    assert ids(dealt) == list(range(200))
    assert dealt == partition(ROWS, 0, "train")
    if not isinstance(partition, ByCategory):
        assert dealt != partition(ROWS, 1, "train")


def test_by_category():
    dealt = ByCategory(("c", "a"), rows=10)(ROWS, 0, "train")
    assert {name: {r.category for r in rows} for name, rows in dealt.items()} == {
        "c": {"c"},
        "a": {"a"},
    }
    assert [len(rows) for rows in dealt.values()] == [10, 10]
    assert len(ByCategory(("c",), rows=10)(ROWS, 0, "test")["c"]) == 50
    with pytest.raises(PomonaError, match=r'client "x" has no train rows: .* a, b, c, d'):
        ByCategory(("x",))(ROWS, 0, "train")


def test_iid_is_even_and_dirichlet_skewed():
    assert {len(rows) for rows in IID(8)(ROWS, 0, "train").values()} == {25}

    def largest_share(alpha):
        dealt = Dirichlet(4, alpha)(ROWS, 0, "train")
        return max(sum(r.category == "a" for r in rows) for rows in dealt.values()) / 50

    assert largest_share(0.05) > 0.6
    assert largest_share(1000) < 0.35
    with pytest.raises(PomonaError, match="alpha 0"):
        Dirichlet(3, 0)
    with pytest.raises(PomonaError, match="0 clients"):
        IID(0)


def test_dirichlet_tests_a_client_on_the_mixture_it_trains_on():
    partition = Dirichlet(4, 0.2)
    train, test = partition(ROWS, 3, "train"), partition(ROWS[:100], 3, "test")
    for name in train:
        for category in "abcd":
            share = sum(r.category == category for r in train[name]) / 50
            held = sum(r.category == category for r in test[name]) / 25
            assert abs(share - held) < 0.06


def test_participants():
    names = [f"c{i}" for i in range(10)]
    chosen = [participants(0, r, names, 0.3) for r in range(50)]
    assert all(len(c) == 3 and c == sorted(c) for c in chosen)
    assert chosen == [participants(0, r, list(reversed(names)), 0.3) for r in range(50)]
    assert {n for c in chosen for n in c} == set(names)
    assert participants(0, 1, names, 1.0) == names
    assert len(participants(0, 1, names, 0.001)) == 1


def test_batches_use_every_row_before_any_twice():
    drawn = batches(0, 1, "a", 10, 4, 5)
    assert [len(b) for b in drawn] == [4] * 5
    flat = [i for b in drawn for i in b]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))
    assert drawn == batches(0, 1, "a", 10, 4, 5)
    others = [batches(*key, 10, 4, 5) for key in ((1, 1, "a"), (0, 2, "a"), (0, 1, "b"))]
    assert all(drawn != other for other in others)
    assert [sorted(b) for b in batches(0, 1, "a", 3, 8, 2)] == [[0, 1, 2]] * 2


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
    with pytest.raises(PomonaError, match=r"cannot read .*ä.test.jsonl"):
        ClientData(folder=tmp_path).load(0)
    with pytest.raises(PomonaError, match="either folder"):
        ClientData()
    with pytest.raises(PomonaError, match="no test file"):
        ClientData(train=tmp_path)
    with pytest.raises(PomonaError, match="is not a folder"):
        ClientData(folder=tmp_path / "x").load(0)


@pytest.mark.parametrize("name", [".hidden", "a/b", "", "x:y"])
def test_names_that_cannot_be_folders_are_refused(name, tmp_path):
    import json

    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "q", "answer": "a", "category": name}))
    with pytest.raises(PomonaError, match="cannot be a folder name"):
        ClientData(train=path, test=path).load(0)
