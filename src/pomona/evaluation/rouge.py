"""ROUGE-L as FLEx reports it: F1 of the longest common subsequence, with stemming.

Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004; Google's rouge-score.
"""

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer


@cache
def _scorer() -> "RougeScorer":
    from rouge_score.rouge_scorer import RougeScorer  # loads all of nltk: half a second of a start

    return RougeScorer(["rougeL"], use_stemmer=True)


def rouge_l(answer: str, reference: str) -> float:
    """Return ROUGE-L F1 between 0 and 100."""
    return 100 * float(_scorer().score(reference, answer)["rougeL"].fmeasure)
