"""Cohorts side by side: one per thread of a processor, on the same frozen weights, or one per GPU on its own.

A small model's step is many small operations, of which two threads make each hardly faster; two threads with
half the clients each take little more than half the time. Hooks belong to modules, so every thread has modules
of its own, around the same tensors. Clients are independent of each other within a round: GPUs need nothing
from each other but the clients' states, which lie in memory between their turns.
"""

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

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

        The threads of torch are shared out among them, as far as they compute. Raises what `work` raises.
        """
        parts = _dealt(items, len(self.bases))
        if len(parts) <= 1:
            return [found for part in parts for found in work(self.bases[0], part)]
        threads = torch.get_num_threads()

        def alone(base: FrozenBase, part: Sequence[Item]) -> Sequence[Result]:
            torch.set_num_threads(max(1, threads // len(parts)))
            with torch.cuda.device(base.device) if base.device.type == "cuda" else nullcontext():
                return work(base, part)

        try:
            with ThreadPoolExecutor(len(parts)) as pool:
                found = list(pool.map(alone, self.bases, parts))
        finally:
            torch.set_num_threads(threads)
        return [one for part in found for one in part]


def replicas_of(base: FrozenBase, others: Sequence[torch.device] = ()) -> Replicas:
    """Return the base and a copy of it on every other device, or as many as a processor has threads."""
    if others or base.device.type != "cpu":
        return Replicas((base, *(_copied(base, device) for device in others)))
    count = min(torch.get_num_threads(), _MOST)
    return Replicas((base, *(_shared(base) for _ in range(count - 1))))


def _shared(base: FrozenBase) -> FrozenBase:
    """Return the same base around modules of its own; no tensor is copied."""
    tensors = [*base.model.parameters(), *base.model.buffers()]
    return _around(base, copy.deepcopy(base.model, {id(tensor): tensor for tensor in tensors}))


def _copied(base: FrozenBase, device: torch.device) -> FrozenBase:
    """Return the same base with weights of its own on a device."""
    known: dict[int, object] = {}
    for parameter in base.model.parameters():  # never a second time where the first ones lie
        known[id(parameter)] = nn.Parameter(parameter.detach().to(device, copy=True), False)
    for buffer in base.model.buffers():
        known[id(buffer)] = buffer.to(device, copy=True)
    return _around(base, copy.deepcopy(base.model, known))


def _around(base: FrozenBase, model: PreTrainedModel) -> FrozenBase:
    sites = tuple(find_expert_sites(model)) if base.sites else ()
    return replace(base, model=model, sites=sites)


def _dealt(items: Sequence[Item], parts: int) -> list[Sequence[Item]]:
    """Return items in their order as up to so many parts of like size, none of them empty."""
    count = min(parts, len(items))
    ends = [len(items) * part // count for part in range(count + 1)] if items else []
    return [items[begin:end] for begin, end in pairwise(ends)]
