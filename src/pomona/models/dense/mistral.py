"""Mistral: Llama with a sliding window, which Mixtral has too."""

from pomona.models.dense.family import DenseFamily
from pomona.models.dense.llama import refuse_biases
from pomona.models.dense.mixtral import EXPERT, ROUTER, mixtral_config

MISTRAL = DenseFamily(
    mlp="model.layers.{layer}.mlp",
    container=mixtral_config,
    expert=EXPERT,
    router=ROUTER,
    check=refuse_biases,
)
