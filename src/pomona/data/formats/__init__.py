"""Row formats by name: a function from a JSON object (and its file:line) to a `Row`."""

from collections.abc import Callable
from typing import Any

from pomona.data.formats.alpaca import alpaca
from pomona.data.formats.dolly import dolly
from pomona.data.formats.prompt import prompt
from pomona.data.formats.qa import qa
from pomona.data.row import Row
from pomona.errors import PomonaError

FORMATS: dict[str, Callable[[dict[str, Any], str], Row]] = {
    "dolly": dolly,
    "alpaca": alpaca,
    "qa": qa,
    "prompt": prompt,
}

_FIELDS = {
    "dolly": ("instruction", "response"),
    "alpaca": ("instruction", "output"),
    "qa": ("question", "answer"),
    "prompt": ("prompt", "completion"),
}


def detect(record: dict[str, Any], where: str) -> str:
    """Return the format whose fields a record has; raises `PomonaError` listing them if none fits."""
    for name, fields in _FIELDS.items():
        if all(field in record for field in fields):
            return name
    known = "; ".join(f"{name}: {' and '.join(fields)}" for name, fields in _FIELDS.items())
    raise PomonaError(
        f"{where}: fields {', '.join(record) or 'none'} fit no row format; the formats need {known}"
    )
