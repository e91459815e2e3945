"""What reconstruction needs to know of a dense family, and of the stock models that hold the result."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as fn

from pomona.models.weights import Checkpoint

ALIGNMENT = 8  # channels: grouped matrix products want rows of 16 bytes, in bfloat16 too


@dataclass(frozen=True)
class MixtureSizes:
    """Experts per layer, experts per token, channels per expert, channels of the shared expert."""

    experts: int
    active: int
    width: int
    shared: int = 0
    biased: bool = False

    def aligned(self) -> Self:
        """Return sizes whose widths grouped products take; a single expert stays as it is."""
        if self.experts == 1:
            return self
        return replace(self, width=_up(self.width), shared=_up(self.shared))


def _up(width: int) -> int:
    return -(-width // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class GatedFFN:
    """down · (act(gate · x) ∘ (up · x)) + bias, of any width W."""

    gate_WD: Float[Tensor, "W D"] = field(repr=False)
    up_WD: Float[Tensor, "W D"] = field(repr=False)
    down_DW: Float[Tensor, "D W"] = field(repr=False)
    bias_D: Float[Tensor, " D"] | None = field(default=None, repr=False)

    def padded(self, width: int) -> Self:
        """Return the same function with `width` channels: those added are zero."""
        more = width - len(self.gate_WD)
        gate_WD, up_WD = (fn.pad(part, (0, 0, 0, more)) for part in (self.gate_WD, self.up_WD))
        return replace(self, gate_WD=gate_WD, up_WD=up_WD, down_DW=fn.pad(self.down_DW, (0, more)))


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
    checkpoint that neither can hold. `ends` are the modules that are not layers.
    """

    mlp: str
    mixture: Container
    with_shared: Container | None
    check: Callable[[Checkpoint], None]
    ends: tuple[str, ...] = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
