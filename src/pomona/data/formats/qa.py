"""Question and answer, as MedQuAD and most collections of questions have them."""

from dataclasses import dataclass
from typing import Any

from pomona.data.records import text_field
from pomona.data.row import Row


@dataclass(frozen=True)
class QA:
    """A question and its answer."""

    def fits(self, record: dict[str, Any]) -> bool:
        """Tell whether a record has question and answer."""
        return "question" in record and "answer" in record

    def __call__(self, record: dict[str, Any], where: str) -> Row:
        """Return the row of a record; context and category may be absent."""
        return Row(
            text_field(record, "question", where),
            text_field(record, "context", where, required=False),
            text_field(record, "answer", where),
            text_field(record, "category", where, required=False),
        )
