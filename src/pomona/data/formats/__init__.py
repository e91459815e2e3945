"""Row formats by name: a recipe names one, or each file is recognised by its first record's fields."""

from dataclasses import dataclass
from typing import Any

from pomona.data.formats.alpaca import Alpaca
from pomona.data.formats.dolly import Dolly
from pomona.data.formats.gsm8k import GSM8K
from pomona.data.formats.mapped import Mapped
from pomona.data.formats.messages import Messages
from pomona.data.formats.prompt import Prompt
from pomona.data.formats.protocol import RowFormat
from pomona.data.formats.qa import QA
from pomona.data.formats.sharegpt import ShareGPT
from pomona.data.row import Row
from pomona.errors import PomonaError

__all__ = ["FORMATS", "Auto", "Mapped", "RowFormat", "detect"]


@dataclass(frozen=True)
class Auto:
    """Whichever format has the fields of a file's first record."""

    def fits(self, record: dict[str, Any]) -> bool:
        """Tell whether any format fits."""
        return any(made.fits(record) for made in _known().values())

    def __call__(self, record: dict[str, Any], where: str) -> Row:
        """Return the row of a record on its own; `read_rows` settles on a format per file."""
        return detect(record, where)(record, where)


# In the order in which they are tried: GSM8K's fields are those of any question and answer.
FORMATS: dict[str, Any] = {
    "auto": Auto,
    "dolly": Dolly,
    "alpaca": Alpaca,
    "messages": Messages,
    "sharegpt": ShareGPT,
    "gsm8k": GSM8K,
    "qa": QA,
    "prompt": Prompt,
    "mapped": Mapped,
}


def detect(record: dict[str, Any], where: str) -> RowFormat:
    """Return the format whose fields a record has; raises `PomonaError` listing them if none fits."""
    known = _known()
    for made in known.values():
        if made.fits(record):
            return made
    raise PomonaError(
        f"{where}: fields {', '.join(record) or 'none'} fit no row format ({', '.join(known)}); "
        'name them in the recipe, as in [data.format] kind = "mapped", instruction = "…", response = "…"'
    )


def _known() -> dict[str, RowFormat]:
    return {name: FORMATS[name]() for name in FORMATS if name not in ("auto", "mapped")}
