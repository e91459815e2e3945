"""What comes next is made while something is in use, in order, and its errors are told."""

import threading

import pytest

from pomona.training.ahead import ahead


def test_items_come_in_their_order_and_one_is_made_too_many():
    made = []

    def items():
        for item in range(5):
            made.append(item)
            yield item

    coming = ahead(items())
    assert made == []  # nothing before the first is asked for
    assert [next(coming), next(coming)] == [0, 1]
    coming.close()
    assert made == [0, 1, 2]
    assert list(ahead(range(5))) == list(range(5)) and list(ahead([])) == []


def test_the_next_one_is_made_while_one_is_in_use():
    second = threading.Event()

    def items():
        yield "first"
        second.set()
        yield "second"

    coming = ahead(items())
    assert next(coming) == "first"
    assert second.wait(10)  # nobody has asked for it
    assert next(coming) == "second"


def test_what_making_one_raises_is_raised_where_it_is_asked_for():
    def items():
        yield 1
        raise ValueError("no second one")

    coming = ahead(items())
    assert next(coming) == 1
    with pytest.raises(ValueError, match="no second one"):
        next(coming)
