"""TOML tables to frozen dataclasses and back; an unknown key is an error that lists the valid ones."""

import dataclasses
import json
import os
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import tomli_w
from pydantic import ConfigDict, TypeAdapter, ValidationError

from pomona.data.tables import is_file_name
from pomona.errors import PomonaError
from pomona.recipe.registries import REGISTRIES, kind_of, lacking, member

Settings = TypeVar("Settings")


def build(settings: type[Settings], table: Mapping[str, Any], folder: Path, where: str) -> Settings:
    """Return the dataclass a table describes.

    Paths are resolved against `folder`; `where` names the file (and table) in every error. Raises
    `PomonaError` for an unknown key, a missing one and a value of the wrong type.
    """
    hints = get_type_hints(settings)
    fields = {f.name: f for f in dataclasses.fields(settings) if f.init}  # pyright: ignore[reportArgumentType]
    for key in table:
        if key not in fields:
            valid = f"valid keys are {', '.join(sorted(fields))}" if fields else "it takes none"
            raise PomonaError(f'{where}: unknown key "{key}"; {valid}')
    for name, field in fields.items():
        if name not in table and _required(field):
            raise PomonaError(f'{where}: the key "{name}" is missing; give it a value')
    values = {
        key: _value(hints[key], value, folder, f"{where}: {key}", fields[key])
        for key, value in table.items()
    }
    try:
        return settings(**values)
    except PomonaError as error:
        raise PomonaError(f"{where}: {error}") from error


def dump(settings: Any) -> str:
    """Return the TOML text from which `build` makes equal settings; paths are absolute."""
    return tomli_w.dumps(table_of(settings))


def table_of(settings: Any) -> dict[str, Any]:
    """Return what `dump` writes, as a table."""
    hints = get_type_hints(type(settings))
    table: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if value is None:
            continue
        protocol = next((o for o in _options(hints[field.name]) if o in REGISTRIES), None)
        if protocol is not None:
            table[field.name] = {"kind": kind_of(protocol, value), **table_of(value)}
        elif dataclasses.is_dataclass(value):
            table[field.name] = table_of(value)
        else:
            table[field.name] = str(value) if isinstance(value, Path) else _plain(value)
    return table


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _value(hint: Any, value: Any, folder: Path, where: str, field: dataclasses.Field[Any]) -> Any:
    options = [o for o in _options(hint) if o is not type(None)]
    if options[0] in REGISTRIES:
        return _choice(options[0], value, folder, where)
    if dataclasses.is_dataclass(options[0]):
        if not isinstance(value, Mapping):
            raise PomonaError(f"{where} is {value!r}; it should be a table")
        return build(options[0], value, folder, where)  # pyright: ignore[reportArgumentType]
    if (Path in options or field.metadata.get("path")) and isinstance(value, str):
        return _path(value, folder, where, options)
    try:
        checked = TypeAdapter(hint, config=ConfigDict(allow_inf_nan=False))
        return checked.validate_json(json.dumps(value, default=_as_json), strict=True)
    except ValidationError as error:
        problem = error.errors()[0]["msg"].lower()
        raise PomonaError(f"{where} is {value!r}: {problem}") from error


def _as_json(value: Any) -> str | None:
    """A date of TOML fits no field: null will be refused where text would be taken."""
    return str(value) if isinstance(value, Path) else None


def _options(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _choice(protocol: Any, value: Any, folder: Path, where: str) -> Any:
    """A kind alone, or a table with a kind and its hyper-parameters."""
    table = {"kind": value} if isinstance(value, str) else value
    if not isinstance(table, Mapping) or not isinstance(table.get("kind"), str):
        names = ", ".join(sorted(REGISTRIES[protocol]))
        raise PomonaError(f'{where}: give kind = "…", one of {names}')
    rest = {key: each for key, each in table.items() if key != "kind"}
    made = build(member(protocol, table["kind"], where), rest, folder, where)
    problem = lacking(protocol, made)
    if problem is not None:
        raise PomonaError(
            f'{where}: "{table["kind"]}" is no {protocol.__name__.lower()}: {problem}; see '
            f"{protocol.__module__}.{protocol.__name__}"
        )
    return made


def _path(value: str, folder: Path, where: str, options: Sequence[Any]) -> Path | str:
    """Expand variables and `~`; what is no file where an id is taken too stays a Hub id."""
    expanded = os.path.expandvars(value)
    if "$" in expanded:
        raise PomonaError(
            f'{where} is "{value}", but that environment variable is not set; set it or write the '
            "path out"
        )
    try:
        path = folder / Path(expanded).expanduser()
    except RuntimeError as error:
        raise PomonaError(f'{where} is "{value}", but there is no such home folder') from error
    if str not in options:
        return path
    if Path in options:  # rows: a file has one of a few suffixes, even where it is missing
        return path if is_file_name(expanded) or path.exists() else expanded
    return str(path) if path.exists() or expanded.startswith((".", "/", "~")) else expanded


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
