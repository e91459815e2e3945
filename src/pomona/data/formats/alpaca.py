"""Stanford Alpaca: instruction, input, output."""

from typing import Any

from pomona.data.records import text_field
from pomona.data.row import Row


def alpaca(record: dict[str, Any], where: str) -> Row:
    """Return the row of a record; input and category may be absent."""
    return Row(
        text_field(record, "instruction", where),
        text_field(record, "input", where, required=False),
        text_field(record, "output", where),
        text_field(record, "category", where, required=False),
    )
