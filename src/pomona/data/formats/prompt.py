"""Prompt and completion, as fine-tuning services have them."""

from typing import Any

from pomona.data.records import text_field
from pomona.data.row import Row


def prompt(record: dict[str, Any], where: str) -> Row:
    """Return the row of a record; category may be absent."""
    return Row(
        text_field(record, "prompt", where),
        "",
        text_field(record, "completion", where),
        text_field(record, "category", where, required=False),
    )
