"""One instruction with its answer."""

from dataclasses import dataclass, field
from typing import TypeAlias

Turn: TypeAlias = tuple[str, str]
"""Role ("system", "user" or "assistant") and text."""


@dataclass(frozen=True, slots=True)
class Row:
    """One instruction with its answer; `context` may be empty, `category` is used to deal rows.

    `history` holds the turns of a conversation before the instruction, oldest first. `where` says
    which file and line a row was read from; it is no part of what the row is.
    """

    instruction: str
    context: str
    response: str
    category: str = ""
    history: tuple[Turn, ...] = ()
    where: str = field(default="", compare=False, repr=False)
