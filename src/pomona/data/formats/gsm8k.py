"""GSM8K: a question and a worked answer whose last line is `#### n`.

Cobbe et al., "Training Verifiers to Solve Math Word Problems", arXiv 2110.14168.
"""

import re
from dataclasses import dataclass
from typing import Any

from pomona.data.records import text_field
from pomona.data.row import Row
from pomona.errors import PomonaError

_FINAL = re.compile(r"^#### *\S", re.MULTILINE)
_CALCULATION = re.compile(r"<<[^<>]*>>")


@dataclass(frozen=True)
class GSM8K:
    """A question and a worked answer that ends in `#### n`, which is kept.

    Attributes:
        calculations: Keep the authors' notes for a calculator (`<<48/2=24>>`), which a model without one
            learns to write for every sum.
    """

    calculations: bool = False

    def fits(self, record: dict[str, Any]) -> bool:
        """Tell whether a record has question and an answer with a line `#### n`."""
        answer = record.get("answer")
        return "question" in record and isinstance(answer, str) and bool(_FINAL.search(answer))

    def __call__(self, record: dict[str, Any], where: str) -> Row:
        """Return the row of a record; category may be absent."""
        answer = text_field(record, "answer", where)
        if not _FINAL.search(answer):
            raise PomonaError(
                f'{where}: the answer has no line "#### n"; use the row format "qa" for these rows'
            )
        return Row(
            text_field(record, "question", where),
            "",
            answer if self.calculations else _CALCULATION.sub("", answer),
            text_field(record, "category", where, required=False),
        )
