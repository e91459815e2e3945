"""Mistral: Llama with a sliding window, which Mixtral has too."""

from pomona.models.dense.family import DenseFamily
from pomona.models.dense.granite_shared import GRANITE_SHARED
from pomona.models.dense.llama import refuse_biases
from pomona.models.dense.mixtral import MIXTRAL

MISTRAL = DenseFamily(
    mlp="model.layers.{layer}.mlp",
    mixture=MIXTRAL,
    with_shared=GRANITE_SHARED,
    check=refuse_biases,
)
