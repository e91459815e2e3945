"""Some steps of a cohort: C clients in one forward and backward pass, one optimiser over all of them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from pomona.data.examples import Example
from pomona.federation.cohort import FrozenBase
from pomona.federation.dp_sgd import RowNoise, repeated
from pomona.federation.objective import PackedStep, PaddedStep, client_losses, prepared
from pomona.federation.rehearsal import Rehearsed
from pomona.federation.strategies.protocol import (
    Corrects,
    Penalises,
    Strategy,
    frozen_part,
)
from pomona.federation.update import ClientState, learns, stack, unstack, within
from pomona.shapes import PerClient
from pomona.training.ahead import ahead
from pomona.training.loop import AdamW, Moments, fit

_MOMENTS = ("optimiser.first.", "optimiser.second.")
_STEP = "optimiser.step"
_MEMORY = torch.device("cpu")  # where states wait for their client's next turn


@dataclass(frozen=True)
class Task:
    """One client's part of a round: its whole state, its rows, and what the server remembers and sends."""

    client: str
    state: ClientState
    examples: Sequence[Example] = field(repr=False)
    server: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor], repr=False)


@dataclass(frozen=True)
class Stage:
    """Some steps of some clients together; `drawn` [C][steps][rows] are the rows of each.

    `texts` [C][steps][rows] are those that each rehearses, if the base has any. `rate` is the learning rate,
    `factors` are those of each client's (none: all 1).

    With `noise` the optimiser sees clipped and noised gradients of the rows, and what they cost a client
    beside (a penalty, a correction) is added to them: it is made of what is sent or noised already.
    """

    base: FrozenBase
    tasks: Sequence[Task]
    drawn: Sequence[Sequence[Sequence[int]]]
    strategy: Strategy
    optimiser: AdamW
    rate: float
    pad_id: int
    noise: RowNoise | None = None
    router_loss: float = 0.0
    texts: Sequence[Sequence[Sequence[int]]] = ()
    factors: Sequence[float] = ()

    def run(
        self, states: Sequence[ClientState]
    ) -> list[tuple[ClientState, list[float], dict[str, Tensor]]]:
        """Return every client's new state, losses and, if gradients are corrected, their sum."""
        stacked = stack(states).to(self.base.device)
        state = _with_leaves(stacked, self.strategy)
        received = stack([ClientState(task.state.adapter) for task in self.tasks])
        anchor = received.to(self.base.device).adapter
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
        attached = state if self.noise is None else ClientState()  # rows are attached one by one
        batches = ahead(map(self._prepared, range(count)))  # noised rows are prepared apart
        with self.base.attach(attached), closing(batches):
            history = fit(
                parameters,
                lambda step: self._objective(
                    step - first, batches, state, shared, anchor, correction
                ),
                first + count,
                lambda _step: self.rate,
                self.optimiser if self.noise is None else replace(self.optimiser, clip=0.0),
                resume=resume,
                after=lambda moments, _losses: last.__setitem__(slice(None), [moments]),
                factors=self.factors,
            )
        own = unstack(_with_moments(state, names, last[0]).to(_MEMORY), len(self.tasks))
        gradients = [
            {n: (total[c] - count * correction[n][c]).to(_MEMORY) for n, total in sums.items()}
            for c in range(len(own))
        ]
        return list(zip(own, history.T.tolist(), gradients, strict=True))

    def _objective(
        self,
        step: int,
        batches: Iterator[PackedStep | PaddedStep],
        state: ClientState,
        shared: Mapping[str, Tensor],
        anchor: Mapping[str, Tensor],
        correction: Mapping[str, Tensor],
    ) -> PerClient:
        """Return each client's loss with the strategy's penalty.

        `batches` yields those of all steps, unless rows are noised. What is rehearsed, and a correction, are in
        its gradient alone.
        """
        noise = self.noise
        if noise is None:
            loss_C = next(batches).losses(self.base, self.router_loss)
        else:
            loss_C = self._noised_losses(step, state, noise)
        if isinstance(self.strategy, Penalises):
            loss_C = loss_C + self.strategy.penalty(shared, anchor)
        if noise is not None and self.base.rehearsed is not None:
            loss_C = self._rehearsing(loss_C, self.base.rehearsed, step, state)
        return _with_gradient(loss_C, shared, correction)

    def _rehearsing(
        self, loss_C: PerClient, rehearsed: Rehearsed, step: int, state: ClientState
    ) -> PerClient:
        """Return losses with the gradient of what each client rehearses; without noise: no row is in it."""
        leaves = _named_leaves(state)
        with self.base.attach(state):
            kl = rehearsed.losses(self.base.model, self._texts(step)).sum()
            gradients = torch.autograd.grad(kl, list(leaves.values()), materialize_grads=True)
        return _with_gradient(loss_C, leaves, dict(zip(leaves, gradients, strict=True)))

    def _prepared(self, step: int) -> PackedStep | PaddedStep:
        rows = self._rows(step)
        return prepared(self.base, rows, len(rows), self.pad_id, self._texts(step))

    def _noised_losses(self, step: int, state: ClientState, noise: RowNoise) -> PerClient:
        """Return the mean over each client's rows of their losses; its gradient is the rows' noised mean."""
        loss_X, gradients = self.row_gradients(step, state)
        clients = [task.client for task in self.tasks]
        counts = [len(own[step]) for own in self.drawn]
        mean = noise.mean(gradients, clients, counts, step)
        total_C = loss_X.unflatten(0, (len(clients), -1)).sum(1)
        return _with_gradient(total_C / total_C.new_tensor(counts), _named_leaves(state), mean)

    def row_gradients(
        self, step: int, state: ClientState
    ) -> tuple[Float[Tensor, " X"], dict[str, Tensor]]:
        """Return the loss of every row of a step and its gradient [C·b, …] by all that learns.

        Rows are client-major; a client with fewer than the others has rows of loss and gradient zero at its
        end. Each is a client of its own with its client's state, so that one backward pass gives all.
        """
        rows = self._rows(step)
        size = max(map(len, rows))
        apart = repeated(state, size)
        copies = _named_leaves(apart)
        with self.base.attach(apart):
            loss_X = client_losses(self.base, rows, len(rows) * size, self.pad_id, self.router_loss)
            gradients = torch.autograd.grad(
                loss_X.sum(), list(copies.values()), materialize_grads=True
            )
        return loss_X.detach(), dict(zip(copies, gradients, strict=True))

    def _rows(self, step: int) -> list[list[Example]]:
        return [
            [task.examples[i] for i in own[step]]
            for task, own in zip(self.tasks, self.drawn, strict=True)
        ]

    def _texts(self, step: int) -> list[Sequence[int]]:
        return [own[step] for own in self.texts]

    def _correction(self, stacked: ClientState) -> dict[str, Tensor]:
        if not isinstance(self.strategy, Corrects):
            return {}
        servers = {
            name: torch.stack([task.server[name] for task in self.tasks]).to(self.base.device)
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


def _with_gradient(
    loss_C: PerClient, tensors: Mapping[str, Tensor], gradients: Mapping[str, Tensor]
) -> PerClient:
    """Return losses of the same value with `gradients` [C, …] added to those of some tensors."""
    for name, gradient in gradients.items():
        along_C = (gradient * tensors[name]).reshape(len(gradient), -1).sum(1)
        loss_C = loss_C + (along_C - along_C.detach())
    return loss_C


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


def steps_taken(state: ClientState) -> int:
    """Return how many steps the optimiser that a client has kept has taken."""
    return int(state.memory.get(_STEP, 0))


def without_optimiser(memory: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a client's memory without the moments of its optimiser."""
    return {name: value for name, value in memory.items() if not name.startswith("optimiser.")}
