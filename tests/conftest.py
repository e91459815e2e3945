"""Where tests find real models and data, and how many threads they use."""

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _material(variable: str, default: str) -> Path:
    folder = Path(os.environ.get(variable, ROOT.parent / "shared" / default))
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent; set {variable} to run the tests on real material")
    return folder


@pytest.fixture(scope="session")
def models_dir() -> Path:
    """Folder of real pretrained models (POMONA_MODELS)."""
    return _material("POMONA_MODELS", "models")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of real text and instruction data (POMONA_DATA)."""
    return _material("POMONA_DATA", "data")
