"""How a pipeline tells what it is doing."""

from collections.abc import Callable
from typing import TypeAlias

Progress: TypeAlias = Callable[[str, int, int], None]
"""Called as `progress(stage, done, total)`."""


def silent(stage: str, done: int, total: int) -> None:
    """Tell nobody."""


Tell: TypeAlias = Callable[[str], None]
"""Called with a sentence that a user should read before the work is done."""


def unheard(sentence: str) -> None:
    """Say it to nobody."""


def titled(title: str, progress: Progress) -> Progress:
    """Return a progress whose stages carry a title, for several runs in a row."""

    def tell(stage: str, done: int, total: int) -> None:
        progress(f"{title} {stage}", done, total)

    return tell
