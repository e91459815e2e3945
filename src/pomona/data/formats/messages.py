"""Chat `messages`, as chat templates take them: a list of role and content."""

from dataclasses import dataclass
from typing import Any

from pomona.data.formats.turns import holds_turns, row_of_turns
from pomona.data.row import Row

_KEYS = ("role", "content")
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


@dataclass(frozen=True)
class Messages:
    """A conversation under `messages`; the last assistant turn is the answer."""

    def fits(self, record: dict[str, Any]) -> bool:
        """Tell whether a record has a list of such turns."""
        return holds_turns(record, "messages", _KEYS)

    def __call__(self, record: dict[str, Any], where: str) -> Row:
        """Return the row of a record's last answer; category may be absent."""
        return row_of_turns(record, "messages", _KEYS, _ROLES, where)
