"""Cohorts side by side: as many as the processor has threads, all on the same frozen weights.

A small model's step is many small operations, of which two threads make each hardly faster; two threads with
half the clients each take little more than half the time. Hooks belong to modules, so every thread has modules
of its own, around the same tensors.
"""

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeVar

import torch

from pomona.federation.cohort import FrozenBase
from pomona.models.experts import find_expert_sites

Item = TypeVar("Item")
Result = TypeVar("Result")

_MOST = 8  # threads of Python that do not yet wait for each other


@dataclass(frozen=True)
class Replicas:
    """A frozen base and copies of its modules, one for each part of a cohort that computes by itself."""

    bases: tuple[FrozenBase, ...]

    def map(
        self,
        work: Callable[[FrozenBase, Sequence[Item]], Sequence[Result]],
        items: Sequence[Item],
    ) -> list[Result]:
        """Return what `work` makes of all items, dealt to the replicas in their order and done at once.

        The threads of torch are shared out among them. Raises what `work` raises.
        """
        parts = _dealt(items, len(self.bases))
        if len(parts) <= 1:
            return [found for part in parts for found in work(self.bases[0], part)]
        threads = torch.get_num_threads()

        def alone(base: FrozenBase, part: Sequence[Item]) -> Sequence[Result]:
            torch.set_num_threads(max(1, threads // len(parts)))
            return work(base, part)

        try:
            with ThreadPoolExecutor(len(parts)) as pool:
                found = list(pool.map(alone, self.bases, parts))
        finally:
            torch.set_num_threads(threads)
        return [one for part in found for one in part]


def replicas_of(base: FrozenBase) -> Replicas:
    """Return as many as a processor's threads are, and the base alone where something else computes."""
    count = min(torch.get_num_threads(), _MOST) if base.device.type == "cpu" else 1
    return Replicas((base, *(_replica(base) for _ in range(count - 1))))


def _replica(base: FrozenBase) -> FrozenBase:
    """Return the same base around modules of its own; no tensor is copied."""
    tensors = [*base.model.parameters(), *base.model.buffers()]
    model = copy.deepcopy(base.model, {id(tensor): tensor for tensor in tensors})
    return replace(base, model=model, sites=tuple(find_expert_sites(model)) if base.sites else ())


def _dealt(items: Sequence[Item], parts: int) -> list[Sequence[Item]]:
    """Return items in their order as up to so many parts of like size, none of them empty."""
    count = min(parts, len(items))
    ends = [len(items) * part // count for part in range(count + 1)] if items else []
    return [items[begin:end] for begin, end in pairwise(ends)]
