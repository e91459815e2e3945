"""How long work takes: operations over a rate."""

from time import perf_counter

import torch


def matmul_speed(size: int = 1024) -> float:
    """Return this machine's FLOPs per second in float32 matrix products of a middling size."""
    a = torch.randn(size, size)
    torch.mm(a, a)  # the first product also sets up threads
    began = perf_counter()
    for _ in range(5):
        torch.mm(a, a)
    return 5 * 2 * size**3 / (perf_counter() - began)


def clock(seconds: float) -> str:
    """Return a time as people say it."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
