"""Learning rates as functions of progress."""

import math


def cosine(start: float, end: float, done: int, total: int) -> float:
    """Return the rate after `done` of `total` units: from `start` down to `end` along a cosine.

    FLEx decays across rounds and stays constant within one (arXiv 2506.00965, training script).
    """
    share = done / max(total - 1, 1)
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))
