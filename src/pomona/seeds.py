"""Randomness as a function of what it is for: the same key gives the same draw on every run."""

import hashlib

import numpy as np
import torch


def seed_of(*key: str | int) -> int:
    """Return a 63-bit seed that depends on every part of the key and nothing else."""
    digest = hashlib.sha256("\x1f".join(map(str, key)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def numpy_generator(*key: str | int) -> np.random.Generator:
    """Return NumPy's generator for a key."""
    return np.random.default_rng(seed_of(*key))


def torch_generator(*key: str | int) -> torch.Generator:
    """Return a CPU generator of torch for a key."""
    return torch.Generator().manual_seed(seed_of(*key))
