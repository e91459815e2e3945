"""Updates in eight bits: every change is rounded, and what rounding lost is added to the next one.

Seide, Fu, Droppo, Li & Yu, "1-Bit Stochastic Gradient Descent and its Application to Data-Parallel
Distributed Training of Speech DNNs", Interspeech 2014 (error feedback); Karimireddy, Rebjock, Stich & Jaggi,
"Error Feedback Fixes SignSGD and other Gradient Compression Schemes", ICML 2019.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

BLOCK = 256
_SCALE = ".scale"
_ERROR = "error/"
_Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Compressed:
    """What came of an update's tensors: what travels, what the server makes of it, what was lost.

    `error` is the client's own to remember (`with_error`).
    """

    wire: dict[str, Tensor] = field(repr=False)
    shared: dict[str, Tensor] = field(repr=False)
    error: dict[str, Tensor] = field(repr=False)


def compress(sent: _Tensors, values: _Tensors, error: _Tensors) -> Compressed:
    """Round the change from what was `sent`, and what was lost before, to eight bits.

    Tensors that are not among those sent travel as they are. `error` is empty before the first round.
    """
    wire: dict[str, Tensor] = {}
    lost: dict[str, Tensor] = {}
    for name, value in values.items():
        if name not in sent:
            wire[name] = value
            continue
        wanted = value.double()
        if name in error:
            wanted = wanted + error[name].to(value.device).double()
        wire[name], wire[name + _SCALE] = _rounded(wanted - sent[name].double())
        lost[name] = wanted
    shared = restore(sent, wire)
    error = {
        name: torch.nan_to_num((wanted - shared[name].double()).float(), 0.0, 0.0, 0.0)
        for name, wanted in lost.items()  # a value that is none must not stay with the client for good
    }
    return Compressed(wire, shared, error)


def restore(sent: _Tensors, wire: _Tensors) -> dict[str, Tensor]:
    """Return the tensors of `compress`, as the server has them and as the client knows that it does."""
    return {
        name: _moved(sent[name], value, wire[name + _SCALE]) if name + _SCALE in wire else value
        for name, value in wire.items()
        if not name.endswith(_SCALE)
    }


def compressed_form(sent: _Tensors, values: _Tensors) -> dict[str, Tensor]:
    """Return stand-ins of what `compress` has travel: names, types and shapes."""
    wire: dict[str, Tensor] = {}
    for name, value in values.items():
        if name in sent:
            blocks = -(-value.numel() // BLOCK)
            wire[name] = torch.empty(value.shape, dtype=torch.int8, device="meta")
            wire[name + _SCALE] = torch.empty(blocks, device="meta")
        else:
            wire[name] = value
    return wire


def error_of(memory: _Tensors) -> dict[str, Tensor]:
    """Return what a client remembers of its rounding."""
    return {n.removeprefix(_ERROR): v for n, v in memory.items() if n.startswith(_ERROR)}


def without_error(memory: _Tensors) -> dict[str, Tensor]:
    """Return the rest of a client's memory."""
    return {n: v for n, v in memory.items() if not n.startswith(_ERROR)}


def with_error(memory: _Tensors, error: _Tensors) -> dict[str, Tensor]:
    """Return a client's memory with what rounding has lost so far."""
    return {**without_error(memory), **{_ERROR + n: v for n, v in error.items()}}


def _rounded(change: Tensor) -> tuple[Tensor, Tensor]:
    """Return a change as eight-bit numbers of its shape, and the scale [blocks] of every `BLOCK` of them."""
    flat = change.flatten()
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    scale = (blocks.abs().amax(1) / 127).float()
    steps = (blocks / scale.double().clamp(min=torch.finfo(torch.float64).tiny)[:, None]).round()
    kept = steps.clamp(-127, 127).to(torch.int8).flatten()[: flat.numel()]
    return kept.view(change.shape), scale


def _moved(sent: Tensor, steps: Tensor, scale: Tensor) -> Tensor:
    scales = scale.double().repeat_interleave(BLOCK)[: steps.numel()].view(steps.shape)
    return (sent.double() + steps.double() * scales).to(sent.dtype)
