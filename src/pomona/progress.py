"""How a pipeline tells what it is doing."""

from collections.abc import Callable
from typing import TypeAlias

Progress: TypeAlias = Callable[[str, int, int], None]
"""Called as `progress(stage, done, total)`."""


def silent(stage: str, done: int, total: int) -> None:
    """Tell nobody."""
