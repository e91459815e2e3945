"""Tables of every key of a recipe: name, type, default and meaning, from dataclasses and their docstrings."""

import dataclasses
import inspect
import re
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pomona.recipe.registries import REGISTRIES, kind_of

WORDS = {str: "text", int: "whole number", float: "number", bool: "true or false", Path: "path"}


def settings_tables(root: type[Any]) -> str:
    """Return a section for every table that a recipe of these settings can have, the outermost first."""
    return "\n".join(_section(paths, cls) for cls, paths in tables(root).items())


def tables(root: type[Any]) -> dict[Any, list[str]]:
    """Return every dataclass and protocol of a recipe with the keys under which it stands."""
    found: dict[Any, list[str]] = {root: [""]}
    waiting = [("", root)]
    for path, cls in waiting:  # grows while it is gone through: breadth first
        for field in dataclasses.fields(cls):
            own = f"{path}.{field.name}".lstrip(".")
            for kind in _options(get_type_hints(cls)[field.name]):
                if kind in REGISTRIES or dataclasses.is_dataclass(kind):
                    found.setdefault(kind, []).append(own)
                    if kind not in REGISTRIES:
                        waiting.append((own, kind))
    return found


def meanings(cls: type[Any]) -> dict[str, str]:
    """Return what a class's docstring says of its attributes."""
    _, _, told = (inspect.getdoc(cls) or "").partition("Attributes:\n")
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", told, re.MULTILINE)
    return {name: _line(text) for name, text in entries}


def _section(paths: list[str], cls: Any) -> str:
    if cls in REGISTRIES:
        return _choices(paths, cls)
    title = ", ".join(f"`[{path}]`" for path in paths)
    head = f"### {title} {{#{_anchor(cls)}}}\n\n" if paths[0] else ""
    return head + _told(cls)


def _choices(paths: list[str], protocol: Any) -> str:
    """What `kind` can be, each with its keys."""
    title = ", ".join(f"`{path}`" for path in paths)
    parts = [f"### {title} {{#{_anchor(protocol)}}}\n"]
    for kind, cls in REGISTRIES[protocol].items():
        parts.append(f'#### `kind = "{kind}"` {{#{_anchor(protocol)}-{kind}}}\n\n{_told(cls)}')
    return "\n".join(parts)


def _told(cls: type[Any]) -> str:
    """What a class is, then a table of its keys."""
    hints, meaning = get_type_hints(cls), meanings(cls)
    text = "".join(f"{part}\n\n" for part in _about(cls))
    if not hints:
        return text
    text += "| key | type | default | meaning |\n|---|---|---|---|\n"
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        cells = (_type(hint), _default(field, hint), meaning.get(field.name, ""))
        text += f"| `{field.name}` | {' | '.join(cells)} |\n"
    return text


def _type(hint: Any) -> str:
    return " or ".join(_words(kind) for kind in _options(hint) if kind is not type(None))


def _words(kind: Any) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if kind in WORDS:
        return WORDS[kind]
    if origin is Literal:
        return ", ".join(f'`"{value}"`' for value in inner)
    if origin is tuple:
        return f"list: {_words(inner[0])}"
    if origin is Mapping:
        return f"table of names: {_words(inner[1])}"
    return f"[{'kind' if kind in REGISTRIES else 'table'}](#{_anchor(kind)})"


def _default(field: dataclasses.Field[Any], hint: Any) -> str:
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
        protocol = next((kind for kind in _options(hint) if kind in REGISTRIES), None)
        if protocol is not None:
            return f'`"{kind_of(protocol, value)}"`'
        return "its defaults" if dataclasses.is_dataclass(value) else "–"
    if field.default is dataclasses.MISSING:
        return "**required**"
    return _toml(field.default)


def _toml(value: Any) -> str:
    if value is None or value == () or value == "":
        return "–"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return f"`{list(value)}`".replace("'", '"')
    return f'`"{value}"`' if isinstance(value, str) else f"`{value}`"


def _options(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _anchor(cls: Any) -> str:
    return cls.__name__.lower()


def _about(cls: Any) -> list[str]:
    """The paragraphs of a docstring before its attributes."""
    about, _, _ = (inspect.getdoc(cls) or "").partition("Attributes:\n")
    return [_line(part) for part in re.split(r"\n\s*\n", about.strip())]


def _line(text: str) -> str:
    """Text as a cell of a table holds it."""
    return " ".join(text.split()).replace("|", "\\|")
