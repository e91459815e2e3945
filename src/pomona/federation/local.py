"""Local training of a cohort: C clients in one forward and backward pass.

The base is frozen and the clients' parameters are disjoint, so the gradient of the summed losses is
each client's own. A real site is a cohort of one and runs the same code.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from pomona.data.examples import Batch, Example, collate
from pomona.errors import PomonaError
from pomona.federation.cohort import FrozenBase
from pomona.federation.sampling import batches
from pomona.federation.strategies.protocol import Strategy
from pomona.federation.update import ClientState, split, stack, unstack
from pomona.shapes import PerClient
from pomona.training.loop import AdamW, NotFiniteError, fit
from pomona.training.loss import completion_losses
from pomona.training.schedule import cosine


@dataclass(frozen=True)
class LocalTraining:
    """What every sampled client does in a round.

    `steps` optimiser steps on `batch` rows each. The learning rate falls along a cosine across rounds
    from `learning_rate` to `final_learning_rate` and is constant within one; AdamW starts anew every
    round (FLEx, arXiv 2506.00965, training script).
    """

    steps: int = 5
    batch: int = 4
    learning_rate: float = 2e-3
    final_learning_rate: float = 5e-5
    optimiser: AdamW = field(default_factory=AdamW)

    def __post_init__(self) -> None:
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise PomonaError(
                    f"local {name} {getattr(self, name)} is not positive; use 1 or more"
                )
        if not self.learning_rate >= self.final_learning_rate >= 0:
            raise PomonaError(
                f"local learning_rate {self.learning_rate} must be at least final_learning_rate "
                f"{self.final_learning_rate}, and neither negative"
            )


@dataclass(frozen=True)
class Task:
    """One client's part of a round."""

    client: str
    state: ClientState
    examples: Sequence[Example] = field(repr=False)


def train_cohort(
    base: FrozenBase,
    tasks: Sequence[Task],
    training: LocalTraining,
    strategy: Strategy,
    seed: int,
    round_: int,
    rounds: int,
    pad_id: int,
) -> tuple[list[ClientState], Float[Tensor, "C steps"]]:
    """Train all tasks at once; return their new states and losses (nats per answer token).

    Raises `PomonaError` when a loss stops being finite.
    """
    stacked = stack([task.state for task in tasks])
    trainable = _trainable(stacked)
    state = ClientState(
        {name: trainable[0].get(name, value) for name, value in stacked.adapter.items()},
        {name: trainable[1].get(name, value) for name, value in stacked.graft.items()},
    )
    shared, _ = split(state, strategy.shares)
    anchor = {name: value.detach().clone() for name, value in shared.items()}
    step_batches = _cohort_batches(tasks, training, seed, round_, pad_id)

    def losses(step: int) -> PerClient:
        batch = step_batches[step]
        loss_C = completion_losses(
            base.model,
            batch.input_ids_BT,
            batch.attention_mask_BT,
            batch.label_mask_BT,
            len(tasks),
        )
        penalty_C = strategy.penalty(shared, anchor)
        return loss_C if penalty_C is None else loss_C + penalty_C

    rate = cosine(training.learning_rate, training.final_learning_rate, round_ - 1, rounds)
    parameters = [*trainable[0].values(), *trainable[1].values()]
    try:
        with base.attach(state):
            history = fit(
                parameters, losses, training.steps, lambda _step: rate, training.optimiser
            )
    except NotFiniteError as error:
        raise PomonaError(
            f'training of client "{tasks[error.client].client}" diverged in round {round_}; lower '
            "local.learning_rate or train in float32"
        ) from error
    return unstack(state, len(tasks)), history.T


def _trainable(stacked: ClientState) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return leaves with gradients for every floating tensor; indices stay as they are."""

    def leaves(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: value.detach().clone().requires_grad_()
            for name, value in tensors.items()
            if value.is_floating_point()
        }

    return leaves(stacked.adapter), leaves(stacked.graft)


def _cohort_batches(
    tasks: Sequence[Task], training: LocalTraining, seed: int, round_: int, pad_id: int
) -> list[Batch]:
    """Return each step's batch [C·b, T], client-major; short clients are filled with empty rows."""
    drawn = [
        batches(seed, round_, t.client, len(t.examples), training.batch, training.steps)
        for t in tasks
    ]
    return [
        _fill(
            [
                [task.examples[i] for i in rows[step]]
                for task, rows in zip(tasks, drawn, strict=True)
            ],
            pad_id,
        )
        for step in range(training.steps)
    ]


def _fill(rows: Sequence[Sequence[Example]], pad_id: int) -> Batch:
    """Collate client-major; a row added for alignment repeats a real one but carries no label."""
    size = max(map(len, rows))
    batch = collate([row for own in rows for row in [*own, *[own[0]] * (size - len(own))]], pad_id)
    real_B = torch.tensor([k < len(own) for own in rows for k in range(size)])
    return Batch(
        batch.input_ids_BT, batch.attention_mask_BT, batch.label_mask_BT & real_B.unsqueeze(1)
    )
