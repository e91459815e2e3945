"""Instruction rows from JSON lines, whatever their field names."""

from pathlib import Path

from pomona.data.formats import FORMATS, detect
from pomona.data.records import read_records
from pomona.data.row import Row
from pomona.errors import PomonaError

__all__ = ["Row", "read_rows"]


def read_rows(path: Path, format: str = "auto") -> list[Row]:  # noqa: A002
    """Read a JSON-lines file of instructions.

    `format` is a key of `FORMATS`, or "auto": the first whose fields the first row has. Raises
    `PomonaError` with file and line for a line that does not parse or lacks a field.
    """
    if format != "auto" and format not in FORMATS:
        raise PomonaError(f'unknown row format "{format}"; there are auto, {", ".join(FORMATS)}')
    rows: list[Row] = []
    name = format
    for line, record in read_records(path):
        if name == "auto":
            name = detect(record, f"{path}:{line}")
        rows.append(FORMATS[name](record, f"{path}:{line}"))
    if not rows:
        raise PomonaError(f"{path} is empty; it should hold one JSON object per line")
    return rows
