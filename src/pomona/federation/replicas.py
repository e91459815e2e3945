"""Cohorts side by side: as many as the processor has threads, all on the same frozen weights.

A small model's step is many small operations, of which two threads make each hardly faster; two threads with
half the clients each take little more than half the time. Hooks belong to modules, so every thread has modules
of its own, around the same tensors.
"""

import copy
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from pomona.federation.cohort import FrozenBase
from pomona.federation.local import LocalTraining, Trained, train_cohort
from pomona.federation.stage import Task
from pomona.federation.strategies.protocol import Strategy
from pomona.models.experts import find_expert_sites

_MOST = 8  # threads of Python that do not yet wait for each other


@dataclass(frozen=True)
class Replicas:
    """A frozen base and copies of its modules, one for each cohort that trains at the same time."""

    bases: tuple[FrozenBase, ...]

    def train(
        self,
        tasks: Sequence[Task],
        training: LocalTraining,
        strategy: Strategy,
        seed: int | str,
        round_: int,
        rounds: int,
        pad_id: int,
    ) -> list[Trained]:
        """Return what `train_cohort` does of all tasks, dealt to the replicas in their order.

        The threads of torch are shared out among them. Raises `PomonaError` when a loss stops being finite.
        """
        rest = (training, strategy, seed, round_, rounds, pad_id)
        parts = _dealt(tasks, len(self.bases))
        if len(parts) == 1:
            return train_cohort(self.bases[0], tasks, *rest)
        threads = torch.get_num_threads()

        def train(base: FrozenBase, part: Sequence[Task]) -> list[Trained]:
            torch.set_num_threads(max(1, threads // len(parts)))
            return train_cohort(base, part, *rest)

        try:
            with ThreadPoolExecutor(len(parts)) as pool:
                trained = list(pool.map(train, self.bases, parts))
        finally:
            torch.set_num_threads(threads)
        return [one for part in trained for one in part]


def replicas_of(base: FrozenBase) -> Replicas:
    """Return as many as a processor's threads are, and the base alone where something else computes."""
    count = min(torch.get_num_threads(), _MOST) if base.device.type == "cpu" else 1
    return Replicas((base, *(_replica(base) for _ in range(count - 1))))


def _replica(base: FrozenBase) -> FrozenBase:
    """Return the same base around modules of its own; no tensor is copied."""
    tensors = [*base.model.parameters(), *base.model.buffers()]
    model = copy.deepcopy(base.model, {id(tensor): tensor for tensor in tensors})
    return replace(base, model=model, sites=tuple(find_expert_sites(model)) if base.sites else ())


def _dealt(tasks: Sequence[Task], parts: int) -> list[Sequence[Task]]:
    """Return tasks in their order as up to so many parts of like size, none of them empty."""
    count = min(parts, len(tasks))
    ends = [len(tasks) * part // count for part in range(count + 1)]
    return [tasks[begin:end] for begin, end in pairwise(ends)]
