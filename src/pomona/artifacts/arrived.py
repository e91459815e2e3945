"""Answers of sites that have been looked at, on disk until all are there: the server holds one at a time."""

import hashlib
import shutil
from pathlib import Path

from pomona.files import atomic_file
from pomona.parcel import Parcel


class Arrived:
    """The answers to one round, in a folder of their own that is emptied before and after."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.told: dict[str, Parcel] = {}
        self.clear()

    def keep(self, name: str, answer: Parcel) -> None:
        """Write an answer's tensors; the rest of it is small."""
        with atomic_file(self._file(name)) as partial:
            partial.write_bytes(answer.tensors)
        self.told[name] = Parcel(answer.kind, answer.told)

    def take(self, name: str) -> Parcel:
        """Read an answer back, and remove it."""
        told = self.told.pop(name)
        tensors = self._file(name).read_bytes()
        self._file(name).unlink()
        return Parcel(told.kind, told.told, tensors)

    def clear(self) -> None:
        """Forget all of them: who is asked again sends the same once more."""
        self.told.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, name: str) -> Path:
        return self.folder / hashlib.sha256(name.encode()).hexdigest()
