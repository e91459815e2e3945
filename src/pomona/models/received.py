"""Tensors that come from somebody else: decoded without trust, compared with what they should be."""

from collections.abc import Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from pomona.errors import PomonaError


def encoded(tensors: Mapping[str, Tensor]) -> bytes:
    """Return tensors as safetensors, names in order; no tensor at all is no byte."""
    if not tensors:
        return b""
    return save({name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)})


def decoded(data: bytes) -> dict[str, Tensor]:
    """Return the tensors of `encoded`; raises `PomonaError` for bytes that are none. Nothing is unpickled."""
    if not data:
        return {}
    try:
        return load(data)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise PomonaError(f"the tensors are no safetensors ({str(error)[:80]})") from error


def check_like(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise `PomonaError` naming the first tensor that is missing, foreign or of another shape or type."""
    for name in sorted({*tensors, *expected}):
        if name not in expected:
            raise PomonaError(f'the tensor "{name[:120]}" was not asked for')
        if name not in tensors:
            raise PomonaError(f'the tensor "{name}" is missing')
        found, wanted = tensors[name], expected[name]
        if found.shape != wanted.shape or found.dtype != wanted.dtype:
            raise PomonaError(
                f'the tensor "{name}" is {_told(found)} and should be {_told(wanted)}'
            )


def check_values(tensors: Mapping[str, Tensor], sent: Mapping[str, Tensor], largest: float) -> None:
    """Raise `PomonaError` for a value that is not finite, or a change that is absurd.

    The change of all tensors together from what was `sent` may have an L2 norm of at most `largest` times
    one plus that of what was sent.
    """
    change = norm = 0.0
    for name, value in tensors.items():
        if not bool(torch.isfinite(value).all()):
            raise PomonaError(f'the tensor "{name}" has values that are not finite')
        before = sent[name].double() if name in sent else torch.zeros((), dtype=torch.float64)
        change += float((value.double() - before).square().sum())
        norm += float(before.square().sum())
    if change**0.5 > largest * (1 + norm**0.5):
        raise PomonaError(
            f"the change has a norm of {change**0.5:.4g}, more than {largest:g} times one plus the norm of "
            f"what was sent, {norm**0.5:.4g}"
        )


def _told(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
