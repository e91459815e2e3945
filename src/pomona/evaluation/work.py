"""How long work takes: operations over a rate."""

from time import perf_counter

import torch


def matmul_speed(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """Return a device's FLOPs per second in matrix products of a middling size."""
    device = torch.device(device)
    size = 1024 if device.type == "cpu" else 4096  # less would time how a GPU is called
    a = torch.randn(size, size).to(device, dtype)
    float(
        torch.mm(a, a)[0, 0]
    )  # the first product also sets up threads; a value read is waited for
    began = perf_counter()
    for _ in range(4):
        torch.mm(a, a)
    float(torch.mm(a, a)[0, 0])
    return 5 * 2 * size**3 / (perf_counter() - began)


def clock(seconds: float) -> str:
    """Return a time as people say it."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
