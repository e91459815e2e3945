"""Llama: a gated FFN without biases fits Mixtral exactly, and Granite-MoE-Shared with shared channels."""

from pomona.errors import PomonaError
from pomona.models.dense.family import DenseFamily
from pomona.models.dense.granite_shared import GRANITE_SHARED
from pomona.models.dense.mixtral import MIXTRAL
from pomona.models.weights import Checkpoint


def refuse_biases(checkpoint: Checkpoint) -> None:
    """The mixture has no biases; raise `PomonaError` for a checkpoint that has some."""
    for key in ("attention_bias", "mlp_bias"):
        if checkpoint.config.get(key):
            raise PomonaError(
                f"{checkpoint.folder}: {key} is true, and the stock mixture that would hold the result "
                "has no biases; only checkpoints without biases can be reconstructed"
            )


LLAMA = DenseFamily(
    mlp="model.layers.{layer}.mlp",
    mixture=MIXTRAL,
    with_shared=GRANITE_SHARED,
    check=refuse_biases,
)
