"""Groups of domains: hierarchical clustering of the distance 1 − correlation."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy.cluster.hierarchy import cut_tree, linkage
from scipy.spatial.distance import squareform
from torch import Tensor

from pomona.errors import PomonaError
from pomona.reconstruction.affinity import DomainAffinity
from pomona.reconstruction.balance import balanced_clusters
from pomona.seeds import numpy_generator

Linkage = Literal["average", "complete", "ward"]
Grouping = Literal["affinity", "random", "all"]


@dataclass(frozen=True)
class Clusters:
    """One group of domains per expert, and the tree they were cut from (SciPy's linkage matrix)."""

    groups: tuple[tuple[str, ...], ...]
    tree: list[list[float]]


def cluster(affinity: DomainAffinity, experts: int, method: Linkage) -> Clusters:
    """Return exactly `experts` groups, in the order of their first domains.

    There have to be as many domains as experts or more (`refine` splits domains where there are
    fewer).
    """
    count = len(affinity.domains)
    if count == 1:
        return Clusters((tuple(affinity.domains),), [])
    distance_MM = np.clip(1 - affinity.correlation_MM.numpy(), 0, 2)
    distance_MM = (distance_MM + distance_MM.T) / 2
    np.fill_diagonal(distance_MM, 0)
    tree = linkage(squareform(distance_MM), method=method)
    label_M = cut_tree(tree, n_clusters=[experts])[:, 0]
    groups: dict[int, list[str]] = {}
    for domain, label in zip(affinity.domains, label_M, strict=True):
        groups.setdefault(int(label), []).append(domain)
    return Clusters(tuple(tuple(group) for group in groups.values()), tree.tolist())


def random_groups(domains: Sequence[str], experts: int, seed: int) -> tuple[tuple[str, ...], ...]:
    """Deal the domains to `experts` groups at random, sizes equal up to one: no affinity is asked."""
    order = numpy_generator(seed, "random groups").permutation(len(domains))
    dealt = [sorted(order[expert::experts].tolist()) for expert in range(experts)]
    return tuple(tuple(str(domains[i]) for i in own) for own in dealt)


def refine(
    windows: Mapping[str, Tensor], feature: Callable[[Tensor], Tensor], experts: int
) -> dict[str, Tensor]:
    """Split domains until there is one for every expert.

    Fewer domains than experts, or one corpus without domains: the largest domains' windows [B, T] are
    split by balanced k-means on `feature` (their mean hidden states, [B, D]). Parts are named
    "code 1", "code 2". Raises `PomonaError` where a domain has fewer windows than parts.
    """
    parts = dict.fromkeys(windows, 1)
    while sum(parts.values()) < experts:
        parts[max(parts, key=lambda name: len(windows[name]) / parts[name])] += 1
    refined: dict[str, Tensor] = {}
    for name, windows_BT in windows.items():
        if parts[name] == 1:
            refined[name] = windows_BT
            continue
        size = len(windows_BT) // parts[name]
        if size == 0:
            raise PomonaError(
                f'domain "{name}" has {len(windows_BT)} windows, too few to make {parts[name]} parts; '
                "use more windows, more domains or fewer experts"
            )
        used_BT = windows_BT[: size * parts[name]]
        point_BD = feature(used_BT).double().cpu().numpy()
        label_B = balanced_clusters(point_BD, parts[name], size)
        for part in range(parts[name]):
            refined[f"{name} {part + 1}"] = used_BT[torch.from_numpy(label_B == part)]
    return refined
