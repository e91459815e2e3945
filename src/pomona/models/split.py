"""Whose token is whose in a pass of C clients, and what is computed client by client.

Tokens are client-major. With rows of one length every client has as many (`Even`), and one batched product
serves all. Packed rows give each client tokens of its own number (`Ragged`), and on a CPU grouped products,
the kernel of mixtures, take a client for an expert; elsewhere (on a GPU they know bfloat16 alone) each
client's tokens are padded to the most. Both compute the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias, cast

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as fn

_ALIGNED = 16  # bytes between rows of what grouped products take
_GROUPED_TYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Even:
    """As many tokens for each of `clients`."""

    tokens: int
    clients: int
    device: torch.device

    @property
    def client_N(self) -> Int[Tensor, " N"]:
        """The client of every token."""
        return torch.arange(self.tokens, device=self.device) // (self.tokens // self.clients)

    @property
    def sizes(self) -> Sequence[int]:
        """Tokens of each client."""
        return [self.tokens // self.clients] * self.clients

    def product(
        self, x_NI: Float[Tensor, "N I"], weight_CIO: Float[Tensor, "C I O"]
    ) -> Float[Tensor, "N O"]:
        """Return every token times its own client's matrix."""
        if self.clients == 1:  # a plain matrix product: bit for bit what PEFT computes, and faster
            return x_NI @ weight_CIO[0]
        return (x_NI.unflatten(0, (self.clients, -1)) @ weight_CIO).flatten(0, 1)


@dataclass(frozen=True)
class Ragged:
    """`sizes` tokens for each client; some may have none."""

    sizes: tuple[int, ...]
    device: torch.device

    @cached_property
    def client_N(self) -> Int[Tensor, " N"]:
        """The client of every token."""
        clients = torch.arange(len(self.sizes), device=self.device)
        return clients.repeat_interleave(torch.tensor(self.sizes, device=self.device))

    @cached_property
    def _ends_C(self) -> Tensor:
        return torch.tensor(self.sizes).cumsum(0).to(self.device, torch.int32)

    @cached_property
    def _place_N(self) -> Tensor:
        """Where every token lies when all clients have as many as the one with most."""
        longest = max(self.sizes)
        starts = [longest * c - sum(self.sizes[:c]) for c in range(len(self.sizes))]
        shift_N = torch.tensor(starts, device=self.device)[self.client_N]
        return torch.arange(sum(self.sizes), device=self.device) + shift_N

    def product(
        self, x_NI: Float[Tensor, "N I"], weight_CIO: Float[Tensor, "C I O"]
    ) -> Float[Tensor, "N O"]:
        """Return every token times its own client's matrix."""
        if _groups(x_NI):
            return self._grouped(x_NI, weight_CIO)
        padded = x_NI.new_zeros(len(self.sizes) * max(self.sizes), x_NI.shape[1])
        x_CSI = padded.index_copy(0, self._place_N, x_NI).unflatten(0, (len(self.sizes), -1))
        return (x_CSI @ weight_CIO).flatten(0, 1).index_select(0, self._place_N)

    def _grouped(self, x_NI: Tensor, weight_CIO: Tensor) -> Tensor:
        """Grouped products take widths of whole 16 bytes: others are filled up with zeros."""
        wide = _ALIGNED // x_NI.element_size()
        more_in, more_out = (-size % wide for size in weight_CIO.shape[1:])
        if more_in:
            x_NI = fn.pad(x_NI, (0, more_in))
        if more_in or more_out:
            weight_CIO = fn.pad(weight_CIO, (0, more_out, 0, more_in))
        found_NO = fn.grouped_mm(x_NI, weight_CIO, offs=self._ends_C)
        return found_NO[:, :-more_out] if more_out else found_NO


def _groups(x_NI: Tensor) -> bool:
    """Tell whether grouped products are there for a device and a type."""
    return x_NI.device.type == "cpu" and x_NI.dtype in _GROUPED_TYPES


Split: TypeAlias = Even | Ragged


@dataclass
class Present:
    """The split of the pass that is on its way; None where tokens are shared out evenly.

    One per model: what is hooked on asks it, and a packed pass sets it (`packing`).
    """

    split: Ragged | None = None

    def of(self, x_NI: Shaped[Tensor, "N I"], clients: int) -> Split:
        """Return how tokens belong to so many clients; raises `RuntimeError` if they cannot."""
        tokens = len(x_NI)
        if clients == 1 or self.split is None:
            if tokens % clients:
                raise RuntimeError(
                    f"{tokens} tokens cannot be split evenly among {clients} clients"
                )
            return Even(tokens, clients, x_NI.device)
        if (sum(self.split.sizes), len(self.split.sizes)) != (tokens, clients):
            raise RuntimeError(
                f"{tokens} tokens of {clients} clients are not the pass's packed ones"
            )
        return self.split


def frozen_products(
    x_NI: Float[Tensor, "N I"], weights: Sequence[Float[Tensor, "O I"]], split: Split
) -> Float[Tensor, "N O"]:
    """Return every token times its own client's constant matrix: each is used where it lies, none is copied.

    Neighbours with the same one share a product.
    """
    runs: list[tuple[Tensor, int]] = []
    for weight, size in zip(weights, split.sizes, strict=True):
        if runs and _same(runs[-1][0], weight):
            runs[-1] = (weight, runs[-1][1] + size)
        else:
            runs.append((weight, size))
    if len(runs) == 1:
        return fn.linear(x_NI, weights[0])
    return cast(
        Tensor,
        _FrozenProducts.apply(x_NI, [size for _, size in runs], *[weight for weight, _ in runs]),
    )


def _same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr()


class _FrozenProducts(torch.autograd.Function):
    """Products that are written one after another where they belong: neither pass joins copies of parts."""

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, sizes: Sequence[int], *weights: Tensor) -> Tensor:
        ctx.sizes = sizes
        ctx.save_for_backward(*weights)
        return _written(x_NI, sizes, [weight.T for weight in weights])

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - the decorator hides names
        ctx: Any, *pulls: Tensor
    ) -> Any:
        (pull_NO,) = pulls
        weights = ctx.saved_tensors  # once: a checkpointed layer gives them away
        return _written(pull_NO, ctx.sizes, weights), None, *(None for _ in weights)


def _written(x_NI: Tensor, sizes: Sequence[int], weights_IO: Sequence[Tensor]) -> Tensor:
    found_NO = x_NI.new_empty(len(x_NI), weights_IO[0].shape[1])
    parts = zip(x_NI.split(sizes), found_NO.split(sizes), weights_IO, strict=True)
    for own, into, weight_IO in parts:
        torch.mm(own, weight_IO, out=into)
    return found_NO
