"""One instruction with its answer."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One instruction with its answer; `context` may be empty, `category` is used to deal rows."""

    instruction: str
    context: str
    response: str
    category: str = ""
