"""Qwen3: norms on queries and keys, which Qwen3-MoE has too; that has no shared expert.

Qwen3-MoE has one sliding window for all layers or none: a mixture whose dense layers differ in that is
refused, a pruned Qwen3 (one expert) keeps every layer's own.
"""

from pomona.models.dense.family import DenseFamily
from pomona.models.dense.qwen_moe import QWEN3_MOE
from pomona.models.weights import Checkpoint


def _check(_checkpoint: Checkpoint) -> None:
    """Every Qwen3 fits, but for the window that `QWEN3_MOE` looks at."""


QWEN3 = DenseFamily(
    mlp="model.layers.{layer}.mlp", mixture=QWEN3_MOE, with_shared=None, check=_check
)
