"""Some of the examples of a sequence, or those of several one after another: nothing is copied.

Examples may be made only when they are asked for (`data.encoded`); these leave it so.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import overload

from pomona.data.examples import Example


@dataclass(frozen=True)
class Picked(Sequence[Example]):
    """Those of some examples whose numbers are `places`, in that order."""

    examples: Sequence[Example] = field(repr=False)
    places: Sequence[int]

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, place: int) -> Example: ...
    @overload
    def __getitem__(self, place: slice) -> "Picked": ...
    def __getitem__(self, place: int | slice) -> "Example | Picked":
        if isinstance(place, slice):
            return Picked(self.examples, self.places[place])
        return self.examples[self.places[place]]


@dataclass(frozen=True)
class Joined(Sequence[Example]):
    """The examples of several sequences, one after another."""

    parts: Sequence[Sequence[Example]] = field(repr=False)

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(map(len, self.parts)))

    def __len__(self) -> int:
        return self._ends[-1] if self.parts else 0

    @overload
    def __getitem__(self, place: int) -> Example: ...
    @overload
    def __getitem__(self, place: slice) -> Picked: ...
    def __getitem__(self, place: int | slice) -> Example | Picked:
        numbers = range(len(self))
        if isinstance(place, slice):
            return Picked(self, numbers[place])
        number = numbers[place]
        part = bisect_right(self._ends, number)
        return self.parts[part][number - (self._ends[part - 1] if part else 0)]
