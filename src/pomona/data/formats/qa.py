"""Question and answer, as GSM8K and MedQuAD have them."""

from typing import Any

from pomona.data.records import text_field
from pomona.data.row import Row


def qa(record: dict[str, Any], where: str) -> Row:
    """Return the row of a record; context and category may be absent."""
    return Row(
        text_field(record, "question", where),
        text_field(record, "context", where, required=False),
        text_field(record, "answer", where),
        text_field(record, "category", where, required=False),
    )
