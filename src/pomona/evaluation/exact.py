"""Exact match: normalised as for SQuAD; of worked answers, the number after "####".

Rajpurkar et al., "SQuAD: 100,000+ Questions for Machine Comprehension of Text", EMNLP 2016, section
6.1 (case, punctuation, articles and white space do not count). Cobbe et al., "Training Verifiers to
Solve Math Word Problems", 2021: GSM8K ends every solution with "#### NUMBER".
"""

import re
import string
from decimal import Decimal

_MARK = "####"
_NUMBER = re.compile(r"\s*(?:(-)\s*\$?|\$\s*(-?)|)\s*(\d[\d,]*(?:\.\d+)?|\.\d+)")  # one sign
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match(answer: str, reference: str) -> float:
    """Return 100 where an answer says what its reference says, else 0.

    A reference that ends in "#### NUMBER" is met by an answer whose own last "####" is followed by the
    same number (12, 12.0 and $12 are the same, and so are 1200 and 1,200); any other reference by the
    same words in the same order.
    """
    wanted = _number(reference)
    if wanted is not None:
        return 100.0 * (_number(answer) == wanted)
    return 100.0 * (normalised(answer) == normalised(reference))


def normalised(text: str) -> str:
    """Return a text in lower case, without punctuation, articles and superfluous white space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _number(text: str) -> Decimal | None:
    """Return the number after the last mark, or None."""
    _, mark, rest = text.rpartition(_MARK)
    found = _NUMBER.match(rest) if mark else None
    if not found:
        return None
    return Decimal((found[1] or found[2] or "") + found[3].replace(",", ""))
