"""The table of differences between two on the same rows, corrected for being many."""

from collections.abc import Sequence

from pomona.artifacts.page import number, span, table
from pomona.evaluation.intervals import Comparison
from pomona.evaluation.significance import holm


def paired(found: Sequence[tuple[str, Comparison]], digits: int) -> str:
    """Return a row per named difference, nothing without any; Holm's correction is over all of them."""
    if not found:
        return ""
    corrected = holm([compared.p_value for _, compared in found])
    body = [
        [
            name,
            number(compared.difference.mean, digits, "+"),
            span(compared.difference.low, compared.difference.high, digits, "+"),
            number(compared.p_value, 4),
            number(p, 4),
        ]
        for (name, compared), p in zip(found, corrected, strict=True)
    ]
    return table(["difference of means", "value", "95 %", "p", "p, Holm"], body)
