"""Test rows that are trained on, against a comparison of every test row with every train row."""

import unicodedata

import pytest

from pomona.data.duplicates import Example, Repeated, find_duplicates, told
from pomona.data.rows import Row, read_rows


def plain(*texts):
    return tuple(" ".join(unicodedata.normalize("NFKC", t).casefold().split()) for t in texts)


def asked(row):
    return plain(*(text for turn in row.history for text in turn), row.instruction, row.context)


def by_hand(train, test, client):
    """Every test row beside every train row."""
    same = own = prompt = 0
    for row in test[client]:
        hits = [
            name
            for name, rows in train.items()
            for other in rows
            if asked(row) == asked(other) and plain(row.response) == plain(other.response)
        ]
        alike = any(asked(row) == asked(other) for rows in train.values() for other in rows)
        same += bool(hits)
        own += client in hits
        prompt += alike and not hits
    return Repeated(len(test[client]), same, own, prompt)


TRAIN = {
    "a": [Row("Who?", "", "Me", where="t:1"), Row("Why", "not", "So", where="t:2")],
    "b": [Row("Who?", "", "You", where="t:3"), Row("So", "", "x", history=(("user", "hi"),))],
}
TEST = {
    "a": [
        Row(" who?  ", "", "ME\n", "other category", where="s:1"),  # itself trains on it
        Row("Who?", "", "you", where="s:2"),  # another one does
        Row("Who?", "", "They", where="s:3"),  # the prompt alone
        Row("Why not", "", "So", where="s:4"),  # the context is a part of its own
        Row("So", "", "x", where="s:5"),  # other history
    ],
    "b": [Row("ＷＨＯ?", "", "Me", where="s:6"), Row("So", "", "x", history=(("user", "hi"),))],
}


def test_what_is_counted():
    found = find_duplicates(TRAIN, TEST)
    assert found.clients == {"a": Repeated(5, 2, 1, 1), "b": Repeated(2, 2, 1, 0)}
    assert found.clients == {name: by_hand(TRAIN, TEST, name) for name in TEST}
    assert found.total == Repeated(7, 4, 2, 1)
    assert found.example == Example("s:1", "t:1", "a")
    assert told(found) == (
        "duplicates: 4 of 7 test rows are train rows too (a 2, b 2); by the prompt alone 1 more "
        "(a 1); for example s:1 is t:1 of a"
    )
    assert "(a 2, 1 more clients)" in told(found, most=1)


def test_nothing_found_is_said_as_well():
    found = find_duplicates(TRAIN, {"a": [Row("New", "", "x")], "b": [Row("Newer", "", "x")]})
    assert found.total == Repeated(2, 0, 0, 0)
    assert found.example is None
    assert (
        told(found) == "duplicates: none of 2 test rows is a train row, nor its prompt that of one"
    )


def test_a_test_set_that_clients_share_counts_once_in_total():
    shared = TEST["a"]
    found = find_duplicates(TRAIN, {"a": shared, "b": shared})
    assert found.total == Repeated(5, 2, 2, 1)
    assert found.clients["b"] == Repeated(5, 2, 1, 1)


@pytest.mark.parametrize("clients", [1, 3])
def test_real_rows_against_a_comparison_of_all_pairs(data_dir, clients):
    rows = read_rows(data_dir / "dolly-15k" / "test.jsonl")
    train = {str(c): rows[c:300:clients] for c in range(clients)}
    test = {str(c): rows[280 + c : 340 : clients] for c in range(clients)}
    found = find_duplicates(train, test)
    assert found.clients == {name: by_hand(train, test, name) for name in test}
    assert found.total.same >= 20
    assert find_duplicates(train, test) == found
