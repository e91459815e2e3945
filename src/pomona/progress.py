"""How a pipeline tells what it is doing."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Protocol, TypeAlias, runtime_checkable

Figures: TypeAlias = Mapping[str, float]
"""What was measured on the way, by name: `loss`, `tokens_per_second`, `memory_gib` …"""

NONE: Figures = MappingProxyType({})


@runtime_checkable
class Progress(Protocol):
    """Hears how far a stage is, and what was measured there."""

    def __call__(self, stage: str, done: int, total: int, figures: Figures = NONE, /) -> None:
        """Hear that a stage has `done` of `total`."""
        ...


def silent(stage: str, done: int, total: int, figures: Figures = NONE, /) -> None:
    """Tell nobody."""


Tell: TypeAlias = Callable[[str], None]
"""Called with a sentence that a user should read before the work is done."""


def unheard(sentence: str) -> None:
    """Say it to nobody."""


def titled(title: str, progress: Progress) -> Progress:
    """Return a progress whose stages carry a title, for several runs in a row."""

    def tell(stage: str, done: int, total: int, figures: Figures = NONE, /) -> None:
        progress(f"{title} {stage}", done, total, figures)

    return tell


def to_all(*listeners: Progress) -> Progress:
    """Return a progress that several hear."""

    def tell(stage: str, done: int, total: int, figures: Figures = NONE, /) -> None:
        for hear in listeners:
            hear(stage, done, total, figures)

    return tell
