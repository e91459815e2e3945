"""What retraining holds in memory, from shapes."""

from dataclasses import dataclass

from pomona.reconstruction.retraining.settings import Retraining


@dataclass(frozen=True)
class StudentShapes:
    """Numbers of parameters of what retraining sees: the models, and of the student what can learn.

    `ffn` and `router` are one layer's, `factors` what LoRA of rank one has on one layer's FFNs; `norms`
    those of all `layers`.
    """

    dense: int
    total: int
    layers: int
    ffn: int
    factors: int
    router: int
    norms: int


def retraining_bytes(how: Retraining, shapes: StudentShapes) -> int:
    """Return the bytes of weights, of what learns with gradients and moments, and of the merged copies.

    Whatever learns is a parametrisation (`trainable.py`): what a layer multiplies by is a copy, its
    weights with what was learned, and autograd keeps every layer's until the backward pass. With
    checkpointing they are made anew layer by layer. Activations and single operations come on top.
    """
    size = 2 if how.dtype == "bfloat16" else 4
    teacher = size * shapes.dense if how.objective.loss == "distil" else 0
    stages = [_router_stage(how, shapes, size), _expert_stage(how, shapes, size)]
    return size * shapes.total + teacher + max(stages)


_LEARNING = 16  # bytes: a float32 value, its gradient, two moments


def _router_stage(how: Retraining, shapes: StudentShapes, size: int) -> int:
    if how.router.tokens == 0:
        return 0
    held = 1 if how.checkpointing else shapes.layers
    return (_LEARNING * shapes.layers + size * held) * shapes.router


def _expert_stage(how: Retraining, shapes: StudentShapes, size: int) -> int:
    stage = how.experts
    if stage.tokens == 0:
        return 0
    router = shapes.router if stage.router != "none" else 0
    norms = shapes.norms if stage.norms else 0
    own = {"lora": stage.rank * shapes.factors, "full": shapes.ffn, "none": 0}[stage.experts]
    merged = router + (shapes.ffn if stage.experts != "none" else 0)
    held = merged if how.checkpointing else shapes.layers * merged + norms
    return _LEARNING * (shapes.layers * (own + router) + norms) + size * held
