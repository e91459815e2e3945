"""Answers of sites that have been looked at, on disk until all are there: the server holds one at a time."""

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pomona.files import atomic_file, read_as, write_json
from pomona.parcel import Parcel


@dataclass(frozen=True)
class _Told:
    """DIGEST.json beside an answer's tensors."""

    name: str
    kind: str
    told: dict[str, Any]


class Arrived:
    """The answers to one round, in a folder of their own.

    It is emptied before, unless the round goes on where another process was (`again`).
    """

    def __init__(self, folder: Path, again: bool = False):
        self.folder = folder
        self.told: dict[str, Mapping[str, Any]] = {}
        if again:
            found = [read_as(path, _Told) for path in sorted(folder.glob("*.json"))]
            self.told = {one.name: one.told for one in found}
        else:
            self.clear()

    def keep(self, name: str, answer: Parcel) -> None:
        """Write an answer's tensors, then what is told beside them."""
        with atomic_file(self._file(name)) as partial:
            partial.write_bytes(answer.tensors)
        told = _Told(name, answer.kind, dict(answer.told))
        write_json(self._file(name).with_suffix(".json"), asdict(told))
        self.told[name] = answer.told

    def read(self, name: str) -> Parcel:
        """Read an answer back."""
        return Parcel("update", self.told[name], self._file(name).read_bytes())

    def clear(self) -> None:
        """Forget all of them: who is asked again sends the same once more."""
        self.told.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, name: str) -> Path:
        return self.folder / hashlib.sha256(name.encode()).hexdigest()
