"""Stanford Alpaca: instruction, input, output."""

from dataclasses import dataclass
from typing import Any

from pomona.data.records import text_field
from pomona.data.row import Row


@dataclass(frozen=True)
class Alpaca:
    """The fields of Alpaca, Alpaca-gpt4, Finance-Alpaca and MedAlpaca; others, as `text`, are passed over."""

    def fits(self, record: dict[str, Any]) -> bool:
        """Tell whether a record has instruction and output."""
        return "instruction" in record and "output" in record

    def __call__(self, record: dict[str, Any], where: str) -> Row:
        """Return the row of a record; input and category may be absent."""
        return Row(
            text_field(record, "instruction", where),
            text_field(record, "input", where, required=False),
            text_field(record, "output", where),
            text_field(record, "category", where, required=False),
        )
