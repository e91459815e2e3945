"""Qwen2 and Qwen2.5: biases on q, k and v, which Qwen2-MoE has too."""

from pomona.models.dense.family import DenseFamily
from pomona.models.dense.qwen_moe import QWEN2_MOE
from pomona.models.weights import Checkpoint


def _check(_checkpoint: Checkpoint) -> None:
    """Every Qwen2 fits."""


QWEN2 = DenseFamily(
    mlp="model.layers.{layer}.mlp", mixture=QWEN2_MOE, with_shared=QWEN2_MOE, check=_check
)
