"""Some steps of a cohort: C clients in one forward and backward pass, one optimiser over all of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pomona.data.examples import Batch, Example, collate
from pomona.federation.cohort import FrozenBase
from pomona.federation.strategies.protocol import (
    Corrects,
    Penalises,
    Strategy,
    frozen_part,
)
from pomona.federation.update import ClientState, learns, stack, unstack, within
from pomona.shapes import PerClient
from pomona.training.loop import AdamW, Moments, fit
from pomona.training.loss import completion_losses

_MOMENTS = ("optimiser.first.", "optimiser.second.")
_STEP = "optimiser.step"


@dataclass(frozen=True)
class Task:
    """One client's part of a round: its whole state, its rows, and what the server remembers and sends."""

    client: str
    state: ClientState
    examples: Sequence[Example] = field(repr=False)
    server: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor], repr=False)


@dataclass(frozen=True)
class Stage:
    """Some steps of some clients together; `drawn` [C][steps][rows] are the rows of each."""

    base: FrozenBase
    tasks: Sequence[Task]
    drawn: Sequence[Sequence[Sequence[int]]]
    strategy: Strategy
    optimiser: AdamW
    rate: float
    pad_id: int

    def run(
        self, states: Sequence[ClientState]
    ) -> list[tuple[ClientState, list[float], dict[str, Tensor]]]:
        """Return every client's new state, losses and, if gradients are corrected, their sum."""
        stacked = stack(states)
        state = _with_leaves(stacked, self.strategy)
        anchor = stack([task.state for task in self.tasks]).adapter
        shared = {
            n: v
            for n, v in state.adapter.items()
            if v.requires_grad and within(n, self.strategy.shares)
        }
        correction = self._correction(stacked)
        sums = _sum_gradients(shared) if correction else {}
        first, count = steps_taken(states[0]), len(self.drawn[0])
        last: list[Moments] = []

        leaves = _named_leaves(state)
        names, parameters = list(leaves), list(leaves.values())
        resume = _kept_moments(stacked, names, first)
        with self.base.attach(state):
            history = fit(
                parameters,
                lambda step: self._objective(step - first, shared, anchor, correction),
                first + count,
                lambda _step: self.rate,
                self.optimiser,
                resume=resume,
                after=lambda moments, _losses: last.__setitem__(slice(None), [moments]),
            )
        own = unstack(_with_moments(state, names, last[0]), len(self.tasks))
        gradients = [
            {n: total[c] - count * correction[n][c] for n, total in sums.items()}
            for c in range(len(own))
        ]
        return list(zip(own, history.T.tolist(), gradients, strict=True))

    def _objective(
        self,
        step: int,
        shared: Mapping[str, Tensor],
        anchor: Mapping[str, Tensor],
        correction: Mapping[str, Tensor],
    ) -> PerClient:
        """Return each client's loss with the strategy's penalty; a correction is in its gradient alone."""
        loss_C = self._losses(step)
        if isinstance(self.strategy, Penalises):
            loss_C = loss_C + self.strategy.penalty(shared, anchor)
        for name, gradient in correction.items():
            along_C = (gradient * shared[name]).flatten(1).sum(1)
            loss_C = loss_C + (along_C - along_C.detach())
        return loss_C

    def _losses(self, step: int) -> PerClient:
        """Return each client's loss on its rows of a step, client-major [C·b, T]."""
        rows = [
            [task.examples[i] for i in own[step]]
            for task, own in zip(self.tasks, self.drawn, strict=True)
        ]
        batch = _fill(rows, self.pad_id)
        return completion_losses(
            self.base.model,
            batch.input_ids_BT,
            batch.attention_mask_BT,
            batch.label_mask_BT,
            len(self.tasks),
        )

    def _correction(self, stacked: ClientState) -> dict[str, Tensor]:
        if not isinstance(self.strategy, Corrects):
            return {}
        servers = {
            name: torch.stack([task.server[name] for task in self.tasks])
            for name in self.tasks[0].server
        }
        return self.strategy.correction(servers, stacked.memory)


def _with_leaves(stacked: ClientState, strategy: Strategy) -> ClientState:
    """Return the state with leaves for everything that learns; indices and frozen parts stay as they are."""
    frozen = frozen_part(strategy)

    def leaf(value: Tensor) -> Tensor:
        return value.detach().clone().requires_grad_() if value.is_floating_point() else value

    return ClientState(
        {n: leaf(v) if learns(n, frozen) else v for n, v in stacked.adapter.items()},
        {n: leaf(v) for n, v in stacked.graft.items()},
        {n: leaf(v) for n, v in stacked.personal.items()},
        stacked.memory,
    )


def _named_leaves(state: ClientState) -> dict[str, Tensor]:
    """Return what learns, in one order."""
    parts = {"adapter": state.adapter, "graft": state.graft, "personal": state.personal}
    return {
        f"{part}.{name}": value
        for part, tensors in parts.items()
        for name, value in tensors.items()
        if value.requires_grad
    }


def _kept_moments(stacked: ClientState, names: Sequence[str], step: int) -> Moments | None:
    if _STEP not in stacked.memory:
        return None
    first, second = ([stacked.memory[f"{kind}{n}"] for n in names] for kind in _MOMENTS)
    return Moments(step, first, second)


def _with_moments(state: ClientState, names: Sequence[str], moments: Moments) -> ClientState:
    clients = len(moments.first[0])
    kept = {_STEP: torch.full((clients,), moments.step)}
    for kind, values in zip(_MOMENTS, (moments.first, moments.second), strict=True):
        kept |= {f"{kind}{name}": value for name, value in zip(names, values, strict=True)}
    return replace(state, memory={**state.memory, **kept})


def _sum_gradients(shared: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return sums that grow by each tensor's gradient with every backward pass."""
    sums = {name: torch.zeros_like(value) for name, value in shared.items()}

    def adding(name: str):
        def hook(leaf: Tensor) -> None:
            assert leaf.grad is not None
            sums[name] += leaf.grad

        return hook

    for name, leaf in shared.items():
        leaf.register_post_accumulate_grad_hook(adding(name))
    return sums


def _fill(rows: Sequence[Sequence[Example]], pad_id: int) -> Batch:
    """Collate client-major; a row added for alignment repeats a real one but carries no label."""
    size = max(map(len, rows))
    batch = collate([row for own in rows for row in [*own, *[own[0]] * (size - len(own))]], pad_id)
    real_B = torch.tensor([k < len(own) for own in rows for k in range(size)])
    return Batch(
        batch.input_ids_BT, batch.attention_mask_BT, batch.label_mask_BT & real_B.unsqueeze(1)
    )


def steps_taken(state: ClientState) -> int:
    """Return how many steps the optimiser that a client has kept has taken."""
    return int(state.memory.get(_STEP, 0))


def without_optimiser(memory: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a client's memory without the moments of its optimiser."""
    return {name: value for name, value in memory.items() if not name.startswith("optimiser.")}
