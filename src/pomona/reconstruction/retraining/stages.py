"""The two stages of retraining, resumable after any step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pomona.errors import PomonaError
from pomona.models.experts import ExpertSite, enable_checkpointing, freeze
from pomona.models.placement import memory_gib
from pomona.models.routing import routed_by
from pomona.progress import Progress
from pomona.reconstruction.retraining.objective import language_loss, router_loss
from pomona.reconstruction.retraining.routing import soft, straight_through
from pomona.reconstruction.retraining.settings import Retraining
from pomona.reconstruction.retraining.trainable import (
    merge,
    router_weights,
    scale_routers,
    set_routers,
    train_experts,
    train_routers,
    trained,
)
from pomona.seeds import numpy_generator, torch_generator
from pomona.shapes import PerClient, Tokens
from pomona.training.loop import Moments, NotFiniteError, fit
from pomona.training.schedule import warm_cosine

STAGES = ("router", "experts")


@dataclass(frozen=True)
class StageState:
    """Where retraining is: a stage, what it has learned so far and AdamW's moments of that.

    `routers` are the routers' weights as the stage found them: the first stage changes them.
    """

    stage: str
    routers: Sequence[Tensor] = field(repr=False)
    parameters: Sequence[Tensor] = field(repr=False)
    moments: Moments = field(repr=False)


def retrain(
    student: PreTrainedModel,
    sites: Sequence[ExpertSite],
    teacher: PreTrainedModel | None,
    windows_BT: Tokens,
    settings: Retraining,
    seed: int,
    resume: StageState | None,
    after: Callable[[StageState, float], None],
    progress: Progress,
) -> None:
    """Train `student` in place; afterwards it is an ordinary model again, everything merged.

    The batches of a step depend on the seed and the step alone, so that going on from a `StageState`
    gives the same weights as never having stopped, the student being as it was at first. `after` sees
    the state and the loss of every step.
    """
    freeze(student)
    if settings.checkpointing:
        enable_checkpointing(student)
    budgets = {"router": settings.router.tokens, "experts": settings.experts.tokens}
    started = STAGES.index(resume.stage) if resume else 0
    for stage in STAGES[started:]:
        steps = settings.steps(budgets[stage])
        if steps == 0 or (stage == "router" and not sites):
            continue
        own = resume if resume is not None and resume.stage == stage else None
        _run(
            stage, steps, student, sites, teacher, windows_BT, settings, seed, own, after, progress
        )


def _run(
    stage: str,
    steps: int,
    student: PreTrainedModel,
    sites: Sequence[ExpertSite],
    teacher: PreTrainedModel | None,
    windows_BT: Tokens,
    settings: Retraining,
    seed: int,
    resume: StageState | None,
    after: Callable[[StageState, float], None],
    progress: Progress,
) -> None:
    soft_stage = stage == "router"
    if resume is not None:
        set_routers(sites, resume.routers)
    elif soft_stage:
        scale_routers(sites, settings.router.temperature)  # softmax(logits / t) starts as in use
    routers = router_weights(sites)
    if soft_stage:
        train_routers(sites, relative=False)
    else:
        train_experts(student, sites, settings.experts, torch_generator(seed, "retraining"))
    parameters = list(trained(student).values())
    if not parameters:
        raise PomonaError("nothing would be retrained; train the experts, the router or the norms")
    if resume is not None:
        with torch.no_grad():
            for parameter, value in zip(parameters, resume.parameters, strict=True):
                parameter.copy_(value)
    order = _order(len(windows_BT), settings, steps, seed, stage)
    through = straight_through if settings.objective.straight_through else None
    route = soft(settings.router.temperature) if soft_stage else through
    own = settings.router if soft_stage else settings.experts
    lowest = own.learning_rate * (1.0 if own.schedule == "constant" else own.floor)

    device = parameters[0].device
    with routed_by(sites, route) as routed:

        def losses(number: int) -> PerClient:
            routed.clear()
            chosen = order[number * settings.batch : (number + 1) * settings.batch]
            loss = language_loss(
                student, teacher, windows_BT[chosen].long().to(device), settings.objective
            )
            return (loss + router_loss(routed, settings.objective)).unsqueeze(0)

        def tell(moments: Moments, loss_C: PerClient) -> None:
            figures = {"loss": float(loss_C), "memory_gib": memory_gib()}
            progress(f"retraining {stage}", moments.step, steps, figures)
            after(StageState(stage, routers, parameters, moments), float(loss_C))

        try:
            fit(
                parameters,
                losses,
                steps,
                lambda step: warm_cosine(own.learning_rate, lowest, step, steps, own.warm_up),
                settings.optimiser,
                settings.accumulate,
                resume.moments if resume else None,
                tell,
            )
        except NotFiniteError as error:
            raise PomonaError(
                f"retraining diverged in the stage {stage}; lower retrain.{stage}.learning_rate"
            ) from error
    merge(student)
    if soft_stage:
        scale_routers(sites, 1 / settings.router.temperature)


def _order(windows: int, settings: Retraining, steps: int, seed: int, stage: str) -> Tensor:
    """Return which window every row of every batch is: epochs of permutations, a function of the seed."""
    rows = steps * settings.accumulate * settings.batch
    epochs = -(-rows // windows)
    drawn = [
        torch.from_numpy(numpy_generator(seed, stage, epoch).permutation(windows))
        for epoch in range(epochs)
    ]
    return torch.cat(drawn)[:rows]
