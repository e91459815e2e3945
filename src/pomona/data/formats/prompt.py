"""Prompt and completion, as fine-tuning services have them."""

from dataclasses import dataclass
from typing import Any

from pomona.data.records import text_field
from pomona.data.row import Row


@dataclass(frozen=True)
class Prompt:
    """A prompt and its completion."""

    def fits(self, record: dict[str, Any]) -> bool:
        """Tell whether a record has prompt and completion."""
        return "prompt" in record and "completion" in record

    def __call__(self, record: dict[str, Any], where: str) -> Row:
        """Return the row of a record; category may be absent."""
        return Row(
            text_field(record, "prompt", where),
            "",
            text_field(record, "completion", where),
            text_field(record, "category", where, required=False),
        )
