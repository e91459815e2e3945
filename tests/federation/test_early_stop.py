"""Early stop: what is held back, and when it is enough."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pomona.data.examples import Example
from pomona.errors import PomonaError
from pomona.federation.early_stop import EarlyStop


def examples(count: int) -> list[Example]:
    return [Example((i, 1, 2), 1) for i in range(count)]


@given(st.lists(st.floats(0, 10), max_size=12), st.integers(1, 5))
def test_it_is_enough_when_the_best_lies_patience_measurements_back(losses, patience):
    best = losses.index(min(losses)) if losses else 0
    assert EarlyStop(patience).reached(losses) == (len(losses) - 1 - best >= patience)


@given(st.integers(2, 60), st.floats(0.01, 0.9), st.integers(0, 3))
def test_every_row_is_either_trained_on_or_held_back(count, share, seed):
    stop, rows = EarlyStop(share=share), examples(count)
    if max(1, round(share * count)) >= count:
        with pytest.raises(PomonaError, match=r'client "a" has \d+ train rows'):
            stop.hold_back(seed, "a", rows)
        return
    train, kept = stop.hold_back(seed, "a", rows)
    assert sorted((*train, *kept), key=lambda e: e.input_ids) == rows
    assert len(kept) == max(1, round(share * count))
    assert (train, kept) == stop.hold_back(seed, "a", rows)


def test_clients_hold_back_rows_of_their_own():
    kept = {EarlyStop(share=0.5).hold_back(0, name, examples(20))[1][0] for name in "abcdefgh"}
    assert len(kept) > 1


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"patience": 0}, "early_stop patience 0 is not positive"),
        ({"every": 0}, "early_stop every 0 is not positive"),
        ({"share": 1.0}, "early_stop share 1.0 is not between 0 and 1"),
        ({"share": 0.0}, "early_stop share 0.0 is not between 0 and 1"),
    ],
)
def test_what_cannot_be_is_told(given_, message):
    with pytest.raises(PomonaError, match=message):
        EarlyStop(**given_)
