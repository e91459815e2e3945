"""Balanced k-means: clusters of exactly equal size, by optimal assignment."""

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from pomona.errors import PomonaError


def balanced_clusters(
    point_PX: NDArray[np.float64], clusters: int, width: int, iterations: int = 10
) -> NDArray[np.int64]:
    """Return a label per point; every cluster gets exactly `width`, by optimal assignment.

    Centres start at evenly spaced points, so nothing is drawn. Raises `PomonaError` unless
    clusters · width points are given.
    """
    if len(point_PX) != clusters * width:
        raise PomonaError(f"{len(point_PX)} points are not {clusters} clusters of {width}")
    centre_EX = point_PX[np.linspace(0, len(point_PX) - 1, clusters).astype(int)]
    label_P = np.zeros(len(point_PX), np.int64)
    for _ in range(iterations):
        distance_PE = (
            (point_PX**2).sum(1)[:, None]
            - 2 * point_PX @ centre_EX.T
            + (centre_EX**2).sum(1)[None, :]
        )
        rows, places = linear_sum_assignment(np.repeat(distance_PE, width, axis=1))
        new_P = np.empty_like(label_P)
        new_P[rows] = places // width
        if (new_P == label_P).all():
            break
        label_P = new_P
        centre_EX = np.stack([point_PX[label_P == e].mean(0) for e in range(clusters)])
    return label_P
