"""JSON-lines records, read with a place for every complaint."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pomona.errors import PomonaError


def read_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) of a JSON-lines file; blank lines are passed over."""
    for number, line in enumerate(read_utf8(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except RecursionError as error:
            raise PomonaError(f"{path}:{number}: nested too deeply; write a flat object") from error
        except json.JSONDecodeError as error:
            raise PomonaError(
                f"{path}:{number}: not valid JSON ({error.msg} at column {error.colno}); "
                "every line should be one JSON object"
            ) from error
        if not isinstance(record, dict):
            raise PomonaError(f"{path}:{number}: not a JSON object; write one object per line")
        yield number, record


def read_utf8(path: Path) -> str:
    """Return a file's text; raises `PomonaError` naming what is missing or not UTF-8."""
    try:
        return path.read_text("utf-8-sig")
    except OSError as error:
        raise PomonaError(f"cannot read {path}: {error.strerror}; check the path") from error
    except UnicodeDecodeError as error:
        raise PomonaError(
            f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from error


def text_field(record: dict[str, Any], name: str, where: str, *, required: bool = True) -> str:
    """Return a string field; raises `PomonaError` naming file, line and field."""
    if name not in record or record[name] is None:
        if not required:
            return ""
        raise _missing(record, name, where)
    value = record[name]
    if not isinstance(value, str):
        raise PomonaError(f'{where}: the field "{name}" is {value!r}; it should be text')
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise PomonaError(
            f'{where}: the field "{name}" holds half a character ({error.object[error.start]!r}); '
            "write it whole"
        ) from error
    return value


def label_field(record: dict[str, Any], name: str, where: str) -> str:
    """Return a field that rows are sorted by: text, a whole number as text, null as "".

    Raises `PomonaError` naming file, line and field when the record has no such field.
    """
    if name not in record:
        raise _missing(record, name, where)
    value = record[name]
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return text_field(record, name, where, required=False)


def _missing(record: dict[str, Any], name: str, where: str) -> PomonaError:
    found = ", ".join(record) or "none"
    return PomonaError(f'{where}: the field "{name}" is missing; the line has {found}')
