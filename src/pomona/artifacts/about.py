"""run.json: who made a run, with which command and versions."""

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pomona
from pomona.errors import PomonaError
from pomona.files import read_as, read_object, write_json

FORMAT = 3
_PACKAGES = ("torch", "transformers", "peft", "safetensors", "numpy")


@dataclass(frozen=True)
class _About:
    """What a reader of run.json relies on."""

    format: int
    method: str
    seed: int
    pomona: str
    python: str
    torch: str
    transformers: str
    command: list[str] = field(default_factory=list[str])


def write_about(path: Path, about: Mapping[str, Any]) -> None:
    """Write run.json: `about` holds at least the method and the seed; versions are added."""
    versions = {
        "pomona": pomona.__version__,
        "python": platform.python_version(),
        **{name: version(name) for name in _PACKAGES},
    }
    write_json(path, {"format": FORMAT, **versions, **about})


def read_about(path: Path) -> dict[str, Any]:
    """Read run.json back; raises `PomonaError` when it is damaged or of another version."""
    about = read_object(path)
    if isinstance(about.get("format"), int) and about["format"] != FORMAT:
        raise PomonaError(
            f"{path.parent} was written by Pomona {about.get('pomona', 'of before')} in format "
            f"{about['format']}, and this is {pomona.__version__} with format {FORMAT}; use that version, or "
            "choose a new folder"
        )
    read_as(path, _About)
    return about
