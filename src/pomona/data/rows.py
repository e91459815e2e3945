"""Instruction rows from files and from the Hub, whatever their field names."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pomona.data.formats import Auto, RowFormat, detect
from pomona.data.records import label_field
from pomona.data.row import Row
from pomona.data.tables import read_table
from pomona.errors import PomonaError

__all__ = ["Row", "read_rows", "rows_digest"]


def read_rows(
    source: Path | str,
    format: RowFormat | None = None,  # noqa: A002
    split: str = "train",
    category: str = "",
) -> list[Row]:
    """Read instructions from a .jsonl, .json, .csv or .parquet file or a data set of the Hub.

    Without a `format`, or with `Auto`, the first that fits the first record is used for all; `split`
    is what a Hub id means that names none. `category` names the field that holds it, where it is not the
    format's own. Raises `PomonaError` with file and line for a record that does not parse or lacks a
    field.
    """
    rows: list[Row] = []
    chosen = None if isinstance(format, Auto) else format
    name = source.name if isinstance(source, Path) else source
    for line, record in read_table(source, split):
        where = f"{source}:{line}"
        if chosen is None:
            chosen = detect(record, where)
        row = chosen(record, where)
        label = label_field(record, category, where) if category else row.category
        rows.append(replace(row, category=label, where=f"{name}:{line}"))
    if not rows:
        raise PomonaError(f"{source} is empty; it should hold one row per line or record")
    return rows


def rows_digest(rows: Sequence[Row]) -> str:
    """Return a SHA-256 of rows in their order, whatever the file they came from looked like."""
    total = hashlib.sha256()
    for row in rows:
        told = (row.instruction, row.context, row.response, row.category, row.history)
        total.update(json.dumps(told).encode() + b"\n")
    return total.hexdigest()
