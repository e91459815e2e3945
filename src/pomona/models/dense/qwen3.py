"""Qwen3: norms on queries and keys, which Qwen3-MoE has too; that has no shared expert."""

from pomona.models.dense.family import DenseFamily
from pomona.models.dense.qwen_moe import QWEN3_MOE
from pomona.models.weights import Checkpoint


def _check(_checkpoint: Checkpoint) -> None:
    """Every Qwen3 fits."""


QWEN3 = DenseFamily(
    mlp="model.layers.{layer}.mlp", mixture=QWEN3_MOE, with_shared=None, check=_check
)
