"""How long work takes: operations over a rate."""

from time import perf_counter

import torch
from torch import Tensor

_LARGEST = 4096


def matmul_speed(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """Return a device's FLOPs per second in matrix products, large enough to take a while there."""
    size = 256
    while True:
        seconds = _five_products(torch.randn(size, size).to(device, dtype))
        if seconds > 0.1 or size == _LARGEST:
            return 5 * 2 * size**3 / seconds
        size *= 2


def _five_products(a: Tensor) -> float:
    float(torch.mm(a, a)[0, 0])  # the first product also sets up threads
    began = perf_counter()
    for _ in range(4):
        torch.mm(a, a)
    float(torch.mm(a, a)[0, 0])  # a value that is read is waited for, on a GPU too
    return perf_counter() - began


def clock(seconds: float) -> str:
    """Return a time as people say it."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
