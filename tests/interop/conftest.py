"""llama.cpp's converter, where it was fetched."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

CONVERTER = Path(__file__).resolve().parents[2] / "build" / "llama.cpp"
# The converter knows a byte-pair tokenizer by what it makes of a text, and the tests' own by no means.
RUN = f"""
import runpy
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
runpy.run_path({str(CONVERTER / "convert_hf_to_gguf.py")!r}, run_name="__main__")
"""


@pytest.fixture(scope="module")
def gguf_of() -> Iterator[Callable[[Path, Path], dict[str, np.ndarray]]]:
    """Convert a checkpoint folder to a GGUF file and return its tensors by name."""
    if not CONVERTER.is_dir():
        pytest.skip("llama.cpp's converter is not here; `make interop` fetches it")
    sys.path.insert(0, str(CONVERTER / "gguf-py"))
    from gguf import GGUFReader

    def convert(out: Path, target: Path) -> dict[str, np.ndarray]:
        command = [sys.executable, "-c", RUN, out, "--outfile", target, "--outtype", "f32"]
        done = subprocess.run(
            [*map(str, command)],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"PYTHONPATH": f"{CONVERTER / 'gguf-py'}:{CONVERTER}"},
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return {tensor.name: np.array(tensor.data) for tensor in GGUFReader(target).tensors}

    yield convert
    sys.path.remove(str(CONVERTER / "gguf-py"))
