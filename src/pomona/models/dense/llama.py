"""Llama: a gated FFN without biases fits Mixtral exactly."""

from pomona.errors import PomonaError
from pomona.models.dense.family import DenseFamily
from pomona.models.dense.mixtral import EXPERT, ROUTER, mixtral_config
from pomona.models.weights import Checkpoint


def refuse_biases(checkpoint: Checkpoint) -> None:
    """Mixtral has no biases; raise `PomonaError` for a checkpoint that has some."""
    for key in ("attention_bias", "mlp_bias"):
        if checkpoint.config.get(key):
            raise PomonaError(
                f"{checkpoint.folder}: {key} is true, and Mixtral, which would hold the result, has "
                "no biases; only checkpoints without biases can be reconstructed"
            )


LLAMA = DenseFamily(
    mlp="model.layers.{layer}.mlp",
    container=mixtral_config,
    expert=EXPERT,
    router=ROUTER,
    check=refuse_biases,
)
