"""What a row format is."""

from typing import Any, Protocol, runtime_checkable

from pomona.data.row import Row


@runtime_checkable
class RowFormat(Protocol):
    """Reads records of one shape: JSON objects, lines of a CSV with a header, rows of a table."""

    def fits(self, record: dict[str, Any]) -> bool:
        """Tell whether a record has the fields of this format."""
        ...

    def __call__(self, record: dict[str, Any], where: str) -> Row:
        """Return the row of a record; raises `PomonaError` that begins with `where` (file:line)."""
        ...
