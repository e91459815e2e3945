"""A conversation as a row: the last answer of the assistant is what is learnt."""

import json
from collections.abc import Mapping
from typing import Any

from pomona.data.records import text_field
from pomona.data.row import Row, Turn
from pomona.errors import PomonaError


def row_of_turns(
    record: dict[str, Any], field: str, keys: tuple[str, str], roles: Mapping[str, str], where: str
) -> Row:
    """Return the row of the conversation in a record's `field`.

    `keys` name a turn's role and text, `roles` translate what the data calls system, user and
    assistant. The last assistant turn is the answer, the user turn before it the instruction, all
    earlier turns the history, a system turn among them; what follows the answer is left out. Turns of
    one role in a row are joined by an empty line. Raises `PomonaError` naming `where` for a
    conversation without an answered user turn and for a role it does not know.
    """
    turns = _joined(
        [
            _turn(turn, keys, roles, f"{where}: turn {i}")
            for i, turn in _listed(record, field, where)
        ]
    )
    while turns and turns[-1][0] != "assistant":
        turns.pop()
    if len(turns) < 2 or turns[-2][0] != "user":
        raise PomonaError(
            f'{where}: "{field}" has no user turn that the assistant answers; leave the line out'
        )
    category = text_field(record, "category", where, required=False)
    return Row(turns[-2][1], "", turns[-1][1], category, tuple(turns[:-2]))


def holds_turns(record: dict[str, Any], field: str, keys: tuple[str, str]) -> bool:
    """Tell whether a record's `field` is a conversation whose turns have both keys."""
    turns = _parsed(record.get(field))
    return isinstance(turns, list) and bool(turns) and all(_has(turn, keys) for turn in turns)


def _has(turn: Any, keys: tuple[str, str]) -> bool:
    return isinstance(turn, dict) and all(key in turn for key in keys)


def _parsed(value: Any) -> Any:
    """In a CSV a conversation is written as JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _listed(record: dict[str, Any], field: str, where: str) -> list[tuple[int, Any]]:
    turns = _parsed(record.get(field))
    if not isinstance(turns, list):
        found = ", ".join(record) or "none"
        raise PomonaError(f'{where}: the field "{field}" is no list of turns; the line has {found}')
    return list(enumerate(turns, start=1))


def _turn(turn: Any, keys: tuple[str, str], roles: Mapping[str, str], where: str) -> Turn:
    if not isinstance(turn, dict):
        raise PomonaError(f"{where} is {turn!r}; it should be an object with {' and '.join(keys)}")
    role = text_field(turn, keys[0], where)
    if role not in roles:
        raise PomonaError(f'{where} is of "{role}"; the roles are {", ".join(roles)}')
    parts = turn.get(keys[1])
    if isinstance(parts, list):  # content in parts, of which only text can be learnt
        return roles[role], "\n".join(_part(part, where) for part in parts)
    return roles[role], text_field(turn, keys[1], where)


def _part(part: Any, where: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        raise PomonaError(f"{where} holds more than text; leave the line out")
    return text_field(part, "text", where)


def _joined(turns: list[Turn]) -> list[Turn]:
    joined: list[Turn] = []
    for role, text in turns:
        if joined and joined[-1][0] == role:
            joined[-1] = (role, f"{joined[-1][1]}\n\n{text}")
        else:
            joined.append((role, text))
    return joined
