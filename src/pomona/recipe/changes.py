"""`--set key=value`: single keys of a recipe, replaced on the command line."""

import tomllib
from collections.abc import Mapping, Sequence
from typing import Any, cast

from pomona.errors import PomonaError


def changed(table: Mapping[str, Any], changes: Sequence[str]) -> dict[str, Any]:
    """Return a recipe's table with changes like "local.steps=10", one after another.

    A value is TOML; what is none, such as a bare word, is text. Raises `PomonaError` for a change without a key
    or one inside something that is no table. Whether a key exists is seen when the table is built.
    """
    result = dict(table)
    for change in changes:
        key, equals, text = change.partition("=")
        parts = [part.strip() for part in key.split(".")]
        if not equals or not all(parts):
            raise PomonaError(
                f'--set "{change}" is no change; write for example --set local.steps=10'
            )
        _set(result, parts, _value(text.strip()), change)
    return result


def _set(table: dict[str, Any], parts: Sequence[str], value: Any, change: str) -> None:
    first, *rest = parts
    if not rest:
        table[first] = value
        return
    inner = table.get(first, {})
    if isinstance(inner, str):  # a kind without options, as recipes may write it
        inner = {"kind": inner}
    if not isinstance(inner, dict):
        raise PomonaError(f'--set "{change}": {first} is {inner!r} in the recipe, and no table')
    table[first] = dict(cast(dict[str, Any], inner))
    _set(table[first], rest, value, change)


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
