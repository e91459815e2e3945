"""Groups of domains: hierarchical clustering of the distance 1 − correlation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.cluster.hierarchy import cut_tree, linkage
from scipy.spatial.distance import squareform

from pomona.errors import PomonaError
from pomona.reconstruction.affinity import DomainAffinity

Linkage = Literal["average", "complete", "single"]


@dataclass(frozen=True)
class Clusters:
    """One group of domains per expert, and the tree they were cut from (SciPy's linkage matrix)."""

    groups: tuple[tuple[str, ...], ...]
    tree: list[list[float]]


def cluster(affinity: DomainAffinity, experts: int, method: Linkage) -> Clusters:
    """Return exactly `experts` groups, in the order of their first domains.

    Raises `PomonaError` when there are fewer domains than experts.
    """
    count = len(affinity.domains)
    check_enough_domains(affinity.domains, experts)
    distance_MM = np.clip(1 - affinity.correlation_MM.numpy(), 0, 2)
    distance_MM = (distance_MM + distance_MM.T) / 2
    np.fill_diagonal(distance_MM, 0)
    tree = linkage(squareform(distance_MM), method=method)
    label_M = cut_tree(tree, n_clusters=[experts])[:, 0] if count > 1 else np.zeros(1, int)
    groups: dict[int, list[str]] = {}
    for domain, label in zip(affinity.domains, label_M, strict=True):
        groups.setdefault(int(label), []).append(domain)
    return Clusters(tuple(tuple(group) for group in groups.values()), tree.tolist())


def check_enough_domains(domains: Sequence[str], experts: int) -> None:
    """Raise `PomonaError` when the domains cannot give every expert one."""
    if len(domains) < experts:
        raise PomonaError(
            f"{len(domains)} domains ({', '.join(domains)}) cannot make {experts} experts; give at "
            f"least {experts} domains or ask for at most {len(domains)} experts"
        )
