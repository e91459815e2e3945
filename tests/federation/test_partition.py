"""Who holds which rows and who takes part: functions of their seeds."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pomona.data.rows import Row, read_rows
from pomona.errors import PomonaError
from pomona.federation.partition import (
    IID,
    PARTITIONS,
    ByCategory,
    Dirichlet,
    EvenDirichlet,
    SizeSkew,
    SomeCategories,
)
from pomona.federation.partition.iid import apportion
from pomona.federation.sampling import batches, participants, passes
from pomona.seeds import numpy_generator

ROWS = [Row(str(i), "", "r", "abcd"[i % 4]) for i in range(200)]
TEST = ROWS[:100]


def ids(dealt):
    return sorted(int(row.instruction) for rows in dealt.values() for row in rows)


def sizes(dealt):
    return [len(rows) for rows in dealt.values()]


def mixtures(dealt):
    """Rows per client and category [C, K]."""
    return np.array(
        [[sum(r.category == k for r in rows) for k in "abcd"] for rows in dealt.values()]
    )


CHOSEN = [
    ByCategory(),
    SomeCategories(5, 3),
    IID(7),
    Dirichlet(5, 0.3),
    EvenDirichlet(7, 0.3),
    SizeSkew(9),
    SizeSkew(9, law="power"),
]


def test_every_partition_is_tried_here():
    assert {type(partition) for partition in CHOSEN} == set(PARTITIONS.values())


@pytest.mark.parametrize("partition", CHOSEN)
def test_every_row_is_dealt_once_and_seeds_decide(partition):
    dealt = partition(ROWS, TEST, 0)
    assert [ids(own) for own in dealt] == [list(range(200)), list(range(100))]
    assert dealt == partition(ROWS, TEST, 0)
    if not isinstance(partition, ByCategory):
        assert dealt != partition(ROWS, TEST, 1)


@pytest.mark.parametrize("partition", [c for c in CHOSEN if not isinstance(c, ByCategory)])
def test_the_first_rows_of_a_client_show_its_mixture(partition):
    """Whoever measures or calibrates on some of them must not see the first categories alone."""
    train, _ = partition(ROWS, TEST, 2)
    own = max(train.values(), key=len)
    held = {row.category for row in own}
    assert len({row.category for row in own[: len(own) // 2]}) == len(held)


def test_by_category():
    train, test = ByCategory(("c", "a"), rows=10)(ROWS, TEST, 0)
    assert {name: {r.category for r in rows} for name, rows in train.items()} == {
        "c": {"c"},
        "a": {"a"},
    }
    assert (sizes(train), sizes(test)) == ([10, 10], [25, 25])
    with pytest.raises(PomonaError, match=r'client "x" has no train rows: .* a, b, c, d'):
        ByCategory(("x",))(ROWS, TEST, 0)
    with pytest.raises(
        PomonaError, match=r'client "d" has no test rows: .* the rows have a, b, c$'
    ):
        ByCategory(("d",))(ROWS, ROWS[:3], 0)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 6), st.integers(2, 6), st.integers(0, 99))
def test_some_categories_gives_each_client_exactly_as_many(clients, own, categories, seed):
    rows = [Row(str(i), "", "r", "abcdef"[i % categories]) for i in range(categories * 24)]
    partition = SomeCategories(clients, own)
    if own > categories or clients * own < categories:
        with pytest.raises(PomonaError, match="cannot hold the"):
            partition(rows, rows, seed)
        return
    train, test = partition(rows, rows, seed)
    hands = [{row.category for row in held} for held in train.values()]
    assert [len(hand) for hand in hands] == [own] * clients
    assert hands == [{row.category for row in held} for held in test.values()]
    holders = Counter(category for hand in hands for category in hand)
    assert max(holders.values()) - min(holders.values()) <= 1
    for k in "abcdef"[:categories]:
        shares = [sum(r.category == k for r in held) for held in train.values()]
        assert max(shares) - min(s for s in shares if s) <= 1


def test_some_categories_of_a_test_set_that_lacks_one():
    """Who holds what is decided by all rows, so train and test never disagree."""
    train, test = SomeCategories(4, 2)(ROWS, [r for r in ROWS if r.category != "b"], 0)
    for name, own in test.items():
        assert {r.category for r in own} == {r.category for r in train[name]} - {"b"}


def test_iid_is_even():
    assert set(sizes(IID(8)(ROWS, TEST, 0)[0])) == {25}
    assert sizes(IID(3)(ROWS, TEST, 0)[1]) == [34, 33, 33]


def test_dirichlet_is_skewed_by_alpha():
    def largest_share(alpha):
        return mixtures(Dirichlet(4, alpha, minimum=0)(ROWS, TEST, 0)[0])[:, 0].max() / 50

    assert largest_share(0.05) > 0.6
    assert largest_share(1000) < 0.35


def test_dirichlet_deals_the_proportions_it_draws():
    train, test = Dirichlet(4, 0.2, minimum=0)(ROWS, TEST, 3)
    for k, category in enumerate("abcd"):
        share = numpy_generator(3, "dirichlet", category).dirichlet([0.2] * 4)
        assert np.abs(mixtures(train)[:, k] - 50 * share).max() <= 1
        assert np.abs(mixtures(test)[:, k] - 25 * share).max() <= 1


@pytest.mark.parametrize("seed", range(5))
def test_dirichlet_draws_again_until_everybody_has_the_minimum(seed):
    partition = Dirichlet(6, 0.3, minimum=12)
    train, test = partition(ROWS, TEST, seed)
    assert min(sizes(train)) >= 12
    assert min(sizes(test)) >= 1
    free, free_test = Dirichlet(6, 0.3, minimum=0)(ROWS, TEST, seed)
    enough = min(sizes(free)) >= 12 and min(sizes(free_test)) >= 1
    assert (train == free) == enough, "a first draw that is good enough stays"


def test_that_redrawing_is_needed_and_ends():
    few = [min(sizes(Dirichlet(6, 0.3, minimum=0)(ROWS, TEST, s)[0])) for s in range(5)]
    assert min(few) < 12
    with pytest.raises(
        PomonaError, match=r"none of 1000 draws of Dirichlet\(0.05\) gave each of 9 "
    ):
        Dirichlet(9, 0.05, minimum=20)(ROWS, TEST, 0)
    central, _ = Dirichlet(6, 0.3, minimum=12)(ROWS, (), 0)
    assert min(sizes(central)) >= 12


def test_even_dirichlet_gives_all_the_same_number_of_rows_and_their_own_mixtures():
    train, test = EvenDirichlet(8, 0.1)(ROWS, TEST, 0)
    assert (set(sizes(train)), set(sizes(test))) == ({25}, {12, 13})
    assert (mixtures(train).max(1) / 25).mean() > 0.6
    capped, same = EvenDirichlet(4, 1000.0, rows=20)(ROWS, TEST, 0)
    assert set(sizes(capped)) == {20}
    assert np.abs(mixtures(capped) - 5).max() <= 1, (
        "a large alpha: everybody's mixture is that of all"
    )
    assert np.abs(mixtures(same) / 25 - 0.25).max() < 0.1


def test_even_dirichlet_follows_each_client_s_draw_while_the_rows_last():
    """Two clients that take a tenth of the rows: nothing runs out, so the draw decides alone."""
    train, _ = EvenDirichlet(2, 0.7, rows=10)(ROWS, (), 5)
    for client in range(2):
        mixture = numpy_generator(5, "dirichlet-even", client).dirichlet([0.7] * 4)
        assert np.abs(mixtures(train)[client] - 10 * mixture).max() < 1


def test_the_published_setting(data_dir):
    """FLEx's sizes: ten clients of 1,000 rows each, alpha 0.5 and 1.0; the rule of the draw is ours."""
    rows = read_rows(data_dir / "dolly-15k" / "train.jsonl")
    for alpha in (0.5, 1.0):
        train, _ = EvenDirichlet(10, alpha, rows=1000)(rows, (), 0)
        assert sizes(train) == [1000] * 10
        assert len({id(row) for own in train.values() for row in own}) == 10_000


@pytest.mark.parametrize("law", ["log-normal", "power"])
def test_sizes_follow_their_law(law):
    rows = ROWS * 50
    train, test = SizeSkew(8, law, spread=1.5)(rows, TEST, 4)
    if law == "power":
        weights = [1 / k**1.5 for k in range(1, 9)]
    else:
        weights = np.exp(1.5 * numpy_generator(4, "size-skew").standard_normal(8)).tolist()
    expected = [len(rows) * weight / sum(weights) for weight in weights]
    assert np.abs(np.array(sizes(train)) - expected).max() <= 9  # one row each is given first
    assert set(sizes(test)) <= {12, 13}
    share = mixtures(train) / np.array(sizes(train))[:, None]
    large = np.array(sizes(train)) > 400
    assert large.any()
    assert np.abs(share[large] - 0.25).max() < 0.07, "every client has the mixture of all"


def test_size_skew_bounds():
    train, _ = SizeSkew(10, "power", spread=4.0, minimum=5, rows=30)(ROWS, TEST, 0)
    assert min(sizes(train)) >= 5
    assert max(sizes(train)) == 30
    assert max(sizes(SizeSkew(8, spread=0.0)(ROWS, TEST, 0)[0])) == 25


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=9), st.integers(0, 500))
def test_apportioning_adds_up_and_is_off_by_less_than_one(weights, total):
    counts = apportion(np.array(weights), total)
    assert counts.sum() == total
    exact = np.array(weights) / sum(weights) * total
    assert np.abs(counts - exact).max() < 1 + 1e-6


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Dirichlet(3, 0), "alpha 0 is not positive"),
        (lambda: EvenDirichlet(3, float("nan")), "alpha nan is not positive"),
        (lambda: Dirichlet(0), "0 clients make no federation"),
        (lambda: IID(0), "0 clients make no federation"),
        (lambda: SizeSkew(-1), "-1 clients make no federation"),
        (lambda: SomeCategories(0), "0 clients make no federation"),
        (lambda: SomeCategories(3, 0), "categories_per_client 0 leaves clients without rows"),
        (lambda: Dirichlet(minimum=-1), "minimum -1 is not between 0 and"),
        (lambda: Dirichlet(minimum=9, rows=8), r"minimum 9 is not between 0 and .* \(8\)"),
        (lambda: SizeSkew(minimum=0), "minimum 0 is not between 1 and"),
        (lambda: SizeSkew(minimum=9, rows=8), r"minimum 9 is not between 1 and .* \(8\)"),
        (lambda: SizeSkew(spread=-0.1), "spread -0.1 is negative"),
        (lambda: SizeSkew(10, minimum=21)(ROWS, TEST, 0), "need more than the 200 train rows"),
        (lambda: EvenDirichlet(10, rows=21)(ROWS, TEST, 0), "need more than the 200 train rows"),
        (lambda: SomeCategories(3, 1)(ROWS, TEST, 0), "cannot hold the 4 categories of the rows"),
        (lambda: SomeCategories(3, 5)(ROWS, TEST, 0), "cannot hold the 4 categories of the rows"),
    ],
)
def test_what_cannot_be_dealt_is_refused(make, says):
    with pytest.raises(PomonaError, match=says):
        make()


def test_participants():
    names = [f"c{i}" for i in range(10)]
    chosen = [participants(0, r, names, 0.3) for r in range(50)]
    assert all(len(c) == 3 and c == sorted(c) for c in chosen)
    assert chosen == [participants(0, r, list(reversed(names)), 0.3) for r in range(50)]
    assert {n for c in chosen for n in c} == set(names)
    assert participants(0, 1, names, 1.0) == names
    assert len(participants(0, 1, names, 0.001)) == 1


@given(rows=st.integers(1, 20), batch=st.integers(1, 8), epochs=st.integers(1, 4))
def test_an_epoch_is_every_row_once(rows, batch, epochs):
    drawn = passes(0, 1, "a", rows, batch, epochs)
    steps = -(-rows // batch)
    assert len(drawn) == epochs * steps
    for epoch in range(epochs):
        own = drawn[epoch * steps : (epoch + 1) * steps]
        assert sorted(i for b in own for i in b) == list(range(rows))
        assert all(len(b) == min(batch, rows) for b in own[:-1])


def test_batches_use_every_row_before_any_twice():
    drawn = batches(0, 1, "a", 10, 4, 5)
    assert [len(b) for b in drawn] == [4] * 5
    flat = [i for b in drawn for i in b]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))
    assert drawn == batches(0, 1, "a", 10, 4, 5)
    others = [batches(*key, 10, 4, 5) for key in ((1, 1, "a"), (0, 2, "a"), (0, 1, "b"))]
    assert all(drawn != other for other in others)
    assert [sorted(b) for b in batches(0, 1, "a", 3, 8, 2)] == [[0, 1, 2]] * 2
