"""Views are the lists they stand for."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pomona.data.examples import Example
from pomona.data.views import Joined, Picked


def examples(count: int, first: int = 0) -> list[Example]:
    return [Example((first + i, 1, 2), 1) for i in range(count)]


places = st.integers(-12, 12) | st.slices(12)


def same(view, plain, place):
    if isinstance(place, int) and not -len(plain) <= place < len(plain):
        with pytest.raises(IndexError):
            view[place]
    elif isinstance(place, int):
        assert view[place] == plain[place]
    else:
        assert list(view[place]) == plain[place]


@given(st.lists(st.integers(0, 9), max_size=12), places)
def test_picked_are_those_of_some_numbers(numbers, place):
    rows = examples(10)
    view, plain = Picked(rows, numbers), [rows[number] for number in numbers]
    assert list(view) == plain and len(view) == len(plain)
    same(view, plain, place)


@given(st.lists(st.integers(0, 4), max_size=5), places)
def test_joined_are_all_of_several(sizes, place):
    parts = [examples(size, 10 * k) for k, size in enumerate(sizes)]
    view, plain = Joined(parts), [example for part in parts for example in part]
    assert list(view) == plain and len(view) == len(plain)
    same(view, plain, place)
