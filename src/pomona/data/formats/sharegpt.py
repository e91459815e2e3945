"""ShareGPT's `conversations`: a list of from (human, gpt, system) and value."""

from dataclasses import dataclass
from typing import Any

from pomona.data.formats.turns import holds_turns, row_of_turns
from pomona.data.row import Row

_KEYS = ("from", "value")
_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}


@dataclass(frozen=True)
class ShareGPT:
    """A conversation under `conversations`; the last turn of `gpt` is the answer."""

    def fits(self, record: dict[str, Any]) -> bool:
        """Tell whether a record has a list of such turns."""
        return holds_turns(record, "conversations", _KEYS)

    def __call__(self, record: dict[str, Any], where: str) -> Row:
        """Return the row of a record's last answer; category may be absent."""
        return row_of_turns(record, "conversations", _KEYS, _ROLES, where)
