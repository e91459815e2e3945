"""Records from files of several kinds and from the Hub, each with a line for every complaint."""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

from pomona.data.records import read_records, read_utf8
from pomona.errors import PomonaError

Records: TypeAlias = Iterator[tuple[int, dict[str, Any]]]
"""(line, or row where there are no lines, counted from 1; record)."""

_HUB = re.compile(
    r"(?P<name>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[\w./-]+))?"
    r"(?::(?P<config>[\w.-]+)(?=:))?(?::(?P<split>\w+(?:\[[^\[\]]*\])?))?"
)


def read_table(source: Path | str, split: str = "train") -> Records:
    """Yield the records of a file, or of a data set of the Hub if `source` is no path.

    A Hub id is NAME, NAME:SPLIT or NAME:CONFIG:SPLIT (NAME@REVISION pins a version); SPLIT may be a
    slice such as `train[:90%]`, and is `split` where none is given. Raises `PomonaError` naming file
    and line.
    """
    if isinstance(source, str) and not is_file_name(source):
        return _of_hub(source, split)
    path = Path(source)
    if path.suffix not in TABLES:
        raise PomonaError(f"{path} is no {_suffixes()} file; convert it to one of these")
    return TABLES[path.suffix](path)


def is_file_name(source: str) -> bool:
    """Tell a path, even of a file that is missing, from a data set of the Hub."""
    return source.startswith((".", "/", "~")) or Path(source).suffix in TABLES


def _of_json(path: Path) -> Records:
    """Yield the objects of one list; or of lines, which some call .json too."""
    text = read_utf8(path)
    place = _after_space(text, 0)
    if not text.startswith("[", place):
        yield from read_records(path)
        return
    decoder, line, counted = json.JSONDecoder(), 1, 0
    place = _after_space(text, place + 1)
    more = not text.startswith("]", place)
    while more:
        line, counted = line + text.count("\n", counted, place), place
        record, end = _decoded(decoder, text, place, path, line)
        yield line, record
        place = _after_space(text, end)
        more = text.startswith(",", place)
        place = _after_space(text, place + 1) if more else place
    if not text.startswith("]", place) or text[place + 1 :].strip():
        raise PomonaError(
            f"{path}:{line}: not valid JSON (after this object a comma or the end of the list is "
            "missing); write one list of objects, or one object per line"
        )


def _decoded(
    decoder: json.JSONDecoder, text: str, start: int, path: Path, line: int
) -> tuple[dict[str, Any], int]:
    try:
        record, end = decoder.raw_decode(text, start)
    except RecursionError as error:
        raise PomonaError(f"{path}:{line}: nested too deeply; write a flat object") from error
    except json.JSONDecodeError as error:
        raise PomonaError(
            f"{path}:{error.lineno}: not valid JSON ({error.msg} at column {error.colno}); write one "
            "list of objects, or one object per line"
        ) from error
    if not isinstance(record, dict):
        raise PomonaError(f"{path}:{line}: not a JSON object; write a list of objects")
    return record, end


def _after_space(text: str, place: int) -> int:
    while text[place : place + 1].isspace():
        place += 1
    return place


def _of_csv(path: Path) -> Records:
    """Yield a record per line, named by the header; cells may hold line breaks in quotes."""
    csv.field_size_limit(max(csv.field_size_limit(), 2**30))  # a context may be a whole document
    lines = csv.reader(io.StringIO(read_utf8(path), newline=""), strict=True)
    header: list[str] | None = None
    while True:
        where = f"{path}:{lines.line_num + 1}"
        try:
            cells = next(lines, None)
        except csv.Error as error:
            raise PomonaError(f"{where}: not valid CSV ({error})") from error
        if cells is None:
            return
        if not cells:
            continue
        if header is None:
            header = _header(cells, where)
            continue
        if len(cells) != len(header):
            raise PomonaError(
                f"{where}: the line has {len(cells)} columns and the header {len(header)}; quote "
                "cells that hold commas"
            )
        yield int(where.rpartition(":")[2]), dict(zip(header, cells, strict=True))


def _header(cells: list[str], where: str) -> list[str]:
    header = [cell.strip() for cell in cells]
    if len(set(header)) < len(header) or not all(header):
        raise PomonaError(
            f"{where}: the header {', '.join(header)} has an empty or a repeated name; the first line "
            "of a CSV should name its columns"
        )
    return header


def _of_parquet(path: Path) -> Records:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(path) as table:
            for batch in table.iter_batches():
                for number, record in enumerate(batch.to_pylist(), start=number + 1):  # noqa: B020
                    yield number, record
    except FileNotFoundError as error:
        raise PomonaError(
            f"cannot read {path}: No such file or directory; check the path"
        ) from error
    except (ArrowException, OSError) as error:
        told = " ".join(str(error).split())
        raise PomonaError(f"{path} is no whole Parquet file ({told}); copy it again") from error


def _of_hub(source: str, split: str) -> Records:
    parts = _HUB.fullmatch(source)
    if parts is None:
        raise PomonaError(
            f'"{source}" is no {_suffixes()} file and no Hub id; write NAME, NAME:SPLIT or '
            "NAME:CONFIG:SPLIT"
        )
    import datasets

    try:
        table = datasets.load_dataset(
            parts["name"],
            parts["config"],
            split=parts["split"] or split,
            revision=parts["revision"],
        )
    except Exception as error:  # the network, the Hub and the data set's files may fail in any way
        told = " ".join(str(error).split()) or type(error).__name__
        raise PomonaError(
            f'cannot load the data set "{source}" from the Hub: {told.rstrip(".")}; check the name and '
            f"the network, or give a {_suffixes()} file"
        ) from error
    for number, record in enumerate(table, start=1):
        yield number, dict(record)


def _suffixes() -> str:
    *others, last = TABLES
    return f"{', '.join(others)} or {last}"


TABLES: dict[str, Callable[[Path], Records]] = {
    ".jsonl": read_records,
    ".json": _of_json,
    ".csv": _of_csv,
    ".parquet": _of_parquet,
}
