"""Learning rates as functions of progress."""

import math


def cosine(start: float, end: float, done: int, total: int) -> float:
    """Return the rate after `done` of `total` units: from `start` down to `end` along a cosine.

    FLEx decays across rounds and stays constant within one (arXiv 2506.00965, training script).
    """
    share = done / max(total - 1, 1)
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))


def warm_cosine(start: float, end: float, done: int, total: int, warm_up: float) -> float:
    """Return a rate that rises linearly over the share `warm_up` of the way, then falls as `cosine`.

    DIVE retrains so, with 3 % warm-up down to a tenth (arXiv 2506.09351, section 4.1).
    """
    warm = round(warm_up * total)
    if done < warm:
        return start * (done + 1) / warm
    return cosine(start, end, done - warm, total - warm)
