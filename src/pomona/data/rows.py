"""Instruction rows from JSON lines, whatever their field names."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path

from pomona.data.formats import FORMATS, detect
from pomona.data.records import read_records
from pomona.data.row import Row
from pomona.errors import PomonaError

__all__ = ["Row", "read_rows", "rows_digest"]


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


def rows_digest(rows: Sequence[Row]) -> str:
    """Return a SHA-256 of rows in their order, whatever the file they came from looked like."""
    total = hashlib.sha256()
    for row in rows:
        total.update(json.dumps(astuple(row)).encode() + b"\n")
    return total.hexdigest()
