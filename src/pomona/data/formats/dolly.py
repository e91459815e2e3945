"""databricks-dolly-15k: instruction, context, response, category."""

from dataclasses import dataclass
from typing import Any

from pomona.data.records import text_field
from pomona.data.row import Row


@dataclass(frozen=True)
class Dolly:
    """The fields of Dolly."""

    def fits(self, record: dict[str, Any]) -> bool:
        """Tell whether a record has instruction and response."""
        return "instruction" in record and "response" in record

    def __call__(self, record: dict[str, Any], where: str) -> Row:
        """Return the row of a record; context and category may be absent."""
        return Row(
            text_field(record, "instruction", where),
            text_field(record, "context", where, required=False),
            text_field(record, "response", where),
            text_field(record, "category", where, required=False),
        )
