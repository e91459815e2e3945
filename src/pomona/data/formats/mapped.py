"""Any fields: the recipe says which is which."""

from dataclasses import dataclass
from typing import Any

from pomona.data.records import label_field, text_field
from pomona.data.row import Row
from pomona.errors import PomonaError


@dataclass(frozen=True)
class Mapped:
    """Fields that the recipe names.

    An empty name means that rows have no such thing. Context and category may be null or a whole number; a
    name that a record lacks is refused.

    Attributes:
        instruction: Field of what is asked.
        context: Field of what comes with it.
        response: Field of the answer.
        category: Field that rows are dealt by.
    """

    instruction: str = "instruction"
    context: str = ""
    response: str = "response"
    category: str = ""

    def __post_init__(self) -> None:
        for name in ("instruction", "response"):
            if not getattr(self, name):
                raise PomonaError(f"the mapped {name} is empty; name the field that holds it")

    def fits(self, record: dict[str, Any]) -> bool:
        """Tell whether a record has all the fields that are named."""
        named = (self.instruction, self.context, self.response, self.category)
        return all(name in record for name in named if name)

    def __call__(self, record: dict[str, Any], where: str) -> Row:
        """Return the row of a record; a named context or category may be null."""
        return Row(
            text_field(record, self.instruction, where),
            label_field(record, self.context, where) if self.context else "",
            text_field(record, self.response, where),
            label_field(record, self.category, where) if self.category else "",
        )
