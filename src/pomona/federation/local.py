"""Local training of a cohort: C clients in one forward and backward pass.

The base is frozen and the clients' parameters are disjoint, so the gradient of the summed losses is
each client's own. A real site is a cohort of one and runs the same code.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil, inf
from typing import Literal

from torch import Tensor

from pomona.data.examples import Example
from pomona.errors import PomonaError
from pomona.federation.cohort import FrozenBase
from pomona.federation.dp_sgd import DPSGD, RowNoise, steps_of, with_steps
from pomona.federation.privacy import noise_key
from pomona.federation.sampling import batches, passes, samples
from pomona.federation.stage import Stage, Task, steps_taken, without_optimiser
from pomona.federation.strategies.protocol import Corrects, Strategy
from pomona.federation.update import ClientState
from pomona.training.loop import AdamW, NotFiniteError
from pomona.training.loss import balance_weight
from pomona.training.schedule import cosine


@dataclass(frozen=True)
class LocalTraining:
    """What every sampled client does in a round.

    The learning rate falls along a cosine across rounds and is constant within one; AdamW starts anew every
    round (FLEx, arXiv 2506.00965, training script) unless `keep_optimiser`.

    Attributes:
        steps: Optimiser steps per round.
        epochs: Passes over the client's own rows instead of `steps`.
        batch: Rows per step.
        learning_rate: Of the first round.
        final_learning_rate: Of the last.
        keep_optimiser: Every client keeps AdamW's moments from round to round.
        optimiser: AdamW's own settings.
        dp_sgd: The gradient of every row is clipped and their sum is noised: every row counts the same,
            however long its answer, each step draws its rows anew, and the optimiser's own `clip` is off.
            Needs the extra `privacy`.
        router_loss: Factor of the router's load-balancing loss over a client's rows of a step ("model": the
            one in the model's config), for mixtures that define one; with `dp_sgd` over each row by itself.
        rates: What some clients' learning rate is multiplied by; the others' factor is 1.
    """

    steps: int = 5
    epochs: int = 0
    batch: int = 4
    learning_rate: float = 1e-3
    final_learning_rate: float = 5e-5
    keep_optimiser: bool = False
    optimiser: AdamW = field(default_factory=AdamW)
    dp_sgd: DPSGD | None = None
    router_loss: float | Literal["model"] = 0.0
    rates: Mapping[str, float] = field(default_factory=dict[str, float])

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch", 1), ("epochs", 0)):
            if getattr(self, name) < least:
                raise PomonaError(
                    f"local {name} {getattr(self, name)} is too small; use {least} or more"
                )
        if not self.learning_rate >= self.final_learning_rate >= 0:
            raise PomonaError(
                f"local learning_rate {self.learning_rate} must be at least final_learning_rate "
                f"{self.final_learning_rate}, and neither negative"
            )
        if self.router_loss != "model" and not 0 <= self.router_loss < inf:
            raise PomonaError(
                f'local router_loss {self.router_loss} is not 0 or more; use for example 0.001, or "model"'
            )
        for name, rate in self.rates.items():
            if not 0 <= rate < inf:
                raise PomonaError(
                    f'local rates: the factor {rate} of client "{name}" is not 0 or more; use for example 0.5'
                )
        if self.dp_sgd is not None and self.epochs:
            raise PomonaError(
                "local dp_sgd draws the rows of every step anew, so that there are no epochs; leave epochs "
                "out and say how many steps"
            )

    def steps_of(self, rows: int) -> int:
        """Return how many steps a client with so many rows takes in a round."""
        return self.epochs * ceil(rows / self.batch) if self.epochs else self.steps


@dataclass(frozen=True)
class Trained:
    """A client after a round: its state, nats per answer token at every step, what it reports.

    `tokens` are those of its rows that went through the model.
    """

    state: ClientState
    losses: list[float]
    report: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor], repr=False)
    tokens: int = 0


def train_cohort(
    base: FrozenBase,
    tasks: Sequence[Task],
    training: LocalTraining,
    strategy: Strategy,
    seed: int | str,
    round_: int,
    rounds: int,
    pad_id: int,
) -> list[Trained]:
    """Train all tasks at once and return what became of each.

    Clients with fewer steps leave the cohort when they are through. Raises `PomonaError` when a loss
    stops being finite.
    """
    rate = cosine(training.learning_rate, training.final_learning_rate, round_ - 1, rounds)
    steps = [training.steps_of(len(task.examples)) for task in tasks]
    drawn = [
        _drawn(training, seed, round_, task, count)
        for task, count in zip(tasks, steps, strict=True)
    ]
    states = [_counted(task.state, training, 0) for task in tasks]
    said = base.rehearsed
    losses: list[list[float]] = [[] for _ in tasks]
    gradients: list[dict[str, Tensor]] = [{} for _ in tasks]
    for members, first, last in _stages(states, steps):
        stage = Stage(
            base,
            [tasks[c] for c in members],
            [[drawn[c][step] for step in range(first, last)] for c in members],
            strategy,
            training.optimiser,
            rate,
            pad_id,
            _noise(training, seed, round_, first),
            balance_weight(base.model, base.sites, training.router_loss),
            []
            if said is None
            else [said.drawn(seed, round_, tasks[c].client, first, last) for c in members],
            [training.rates.get(tasks[c].client, 1.0) for c in members],
        )
        try:
            trained = stage.run([states[c] for c in members])
        except NotFiniteError as error:
            raise PomonaError(
                f'training of client "{tasks[members[error.client]].client}" diverged in round {round_}; '
                "lower local.learning_rate or train in float32"
            ) from error
        for c, (state, own, gradient) in zip(members, trained, strict=True):
            states[c] = state
            losses[c] += own
            gradients[c] = {n: gradients[c].get(n, 0) + g for n, g in gradient.items()}
    finished = [
        _finished(strategy, training, states[c], losses[c], gradients[c]) for c in range(len(tasks))
    ]
    return [
        replace(own, tokens=_tokens(task.examples, drawn[c]))
        for c, (task, own) in enumerate(zip(tasks, finished, strict=True))
    ]


def _tokens(examples: Sequence[Example], drawn: Iterable[Iterable[int]]) -> int:
    return sum(len(examples[row].input_ids) for step in drawn for row in step)


def _drawn(
    training: LocalTraining, seed: int | str, round_: int, task: Task, steps: int
) -> list[list[int]]:
    """Return the rows of a client's steps, for DP-SGD every step's drawn by itself."""
    rows, batch = len(task.examples), training.batch
    if training.epochs:  # which DP-SGD excludes
        return passes(seed, round_, task.client, rows, batch, training.epochs)
    if training.dp_sgd is None:
        return batches(seed, round_, task.client, rows, batch, steps)
    return samples(noise_key(seed)[0], round_, task.client, rows, batch, steps)


def _noise(training: LocalTraining, seed: int | str, round_: int, first: int) -> RowNoise | None:
    if training.dp_sgd is None:
        return None
    return RowNoise(training.dp_sgd, noise_key(seed)[0], round_, first)


def _counted(state: ClientState, training: LocalTraining, more: int) -> ClientState:
    """Return a state that remembers the noised steps its client has taken, if they are noised."""
    if training.dp_sgd is None:
        return state
    return replace(state, memory=with_steps(state.memory, steps_of(state.memory) + more))


def _stages(
    states: Sequence[ClientState], steps: Sequence[int]
) -> Iterator[tuple[list[int], int, int]]:
    """Return (clients, first step, last step) such that all of a stage have their steps in common.

    One optimiser counts the steps of everybody in it, so clients who have kept different numbers of
    them train apart.
    """
    done = [steps_taken(state) for state in states]
    for count in sorted(set(done)):
        alike = [c for c, own in enumerate(done) if own == count]
        first = 0
        for last in sorted({steps[c] for c in alike}):
            yield [c for c in alike if steps[c] >= last], first, last
            first = last


def _finished(
    strategy: Strategy,
    training: LocalTraining,
    state: ClientState,
    losses: list[float],
    gradients: Mapping[str, Tensor],
) -> Trained:
    """Keep of a client's memory what the next round needs."""
    memory = dict(_counted(state, training, len(losses)).memory)
    if not training.keep_optimiser:
        memory = without_optimiser(memory)
    report: dict[str, Tensor] = {}
    if isinstance(strategy, Corrects):
        mean = {name: total / len(losses) for name, total in gradients.items()}
        own, report = strategy.report(memory, mean)
        memory |= own
    return Trained(replace(state, memory=memory), losses, report)
