"""Fetch llama.cpp's converter for the interop tests: it is in no package, but in the source of one.

    python scripts/fetch_llama_cpp.py

`llama-cpp-python` carries the whole of llama.cpp in its source distribution; the converter and the Python
package it needs are unpacked into build/llama.cpp, and nothing is compiled.
"""

import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

VERSION = "0.3.36"
WANTED = ("convert_hf_to_gguf.py", "conversion/", "gguf-py/")
TARGET = Path(__file__).resolve().parent.parent / "build" / "llama.cpp"


def main() -> None:
    if (TARGET / "convert_hf_to_gguf.py").is_file():
        return
    with tempfile.TemporaryDirectory() as folder:
        package = f"llama-cpp-python=={VERSION}"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        options = ["--no-binary", "llama-cpp-python", package, "--dest", folder]
        subprocess.run([*command, *options], check=True)
        (archive,) = Path(folder).glob("*.tar.gz")
        _unpack(archive)


def _unpack(archive: Path) -> None:
    with tarfile.open(archive) as source:
        inside = f"{archive.name.removesuffix('.tar.gz')}/vendor/llama.cpp/"
        for member in source:
            name = member.name.removeprefix(inside)
            if member.name.startswith(inside) and name.startswith(WANTED):
                member.name = name
                source.extract(member, TARGET, filter="data")


if __name__ == "__main__":
    main()
