"""What reconstruction needs to know of a dense family, and of the stock models that hold the result."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor

from pomona.models.weights import Checkpoint


@dataclass(frozen=True)
class MixtureSizes:
    """Experts per layer, experts per token, channels per expert, channels of the shared expert."""

    experts: int
    active: int
    width: int
    shared: int = 0
    biased: bool = False


@dataclass(frozen=True)
class GatedFFN:
    """down · (act(gate · x) ∘ (up · x)) + bias, of any width W."""

    gate_WD: Float[Tensor, "W D"] = field(repr=False)
    up_WD: Float[Tensor, "W D"] = field(repr=False)
    down_DW: Float[Tensor, "D W"] = field(repr=False)
    bias_D: Float[Tensor, " D"] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class MixtureLayer:
    """One layer's FFNs: a router row per expert, the experts, and an ungated shared expert or none."""

    router_ED: Float[Tensor, "E D"] = field(repr=False)
    experts: Sequence[GatedFFN] = field(repr=False)
    shared: GatedFFN | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Container:
    """A stock architecture that can hold a result.

    `config(dense, sizes)` returns its config.json for a dense one; `tensors(number, layer)` yields a
    layer's FFN tensors under their names on disk.
    """

    name: str
    config: Callable[[dict[str, Any], MixtureSizes], dict[str, Any]]
    tensors: Callable[[int, MixtureLayer], Iterator[tuple[str, Tensor]]]


@dataclass(frozen=True)
class DenseFamily:
    """A family of dense models whose FFN is gated and without biases.

    `mlp` is the prefix of a layer's FFN with `{layer}`; `mixture` holds its experts, `with_shared` also
    a shared expert (None where no stock architecture does); `check` raises `PomonaError` for a
    checkpoint that neither can hold.
    """

    mlp: str
    mixture: Container
    with_shared: Container | None
    check: Callable[[Checkpoint], None]
