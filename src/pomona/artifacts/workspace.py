"""Where a long reconstruction keeps what it has so far, beside the folder it will become."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from pomona.errors import PomonaError
from pomona.files import cannot_write, hold, read_object, write_json
from pomona.models.weights import metadata, read_tensors, write_tensors
from pomona.reconstruction.retraining import StageState
from pomona.training.loop import Moments


@dataclass(frozen=True)
class Workspace:
    """The hidden folder `.OUT.work` beside OUT, held by one command at a time."""

    path: Path
    _lock: int = field(repr=False, compare=False)

    @classmethod
    def open(cls, out: Path, identity: Mapping[str, Any]) -> Self:
        """Open the workspace of `out` for the reconstruction that `identity`, JSON, describes.

        Raises `PomonaError` when it belongs to another one or is in use.
        """
        path = out.with_name(f".{out.name}.work")
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise cannot_write(path, error) from error
        hold(lock, path)
        known = path / "began.json"
        begun = (path / "mixture").is_dir() and known.is_file()
        before = read_object(known) if begun else {}
        other = [key for key in identity if begun and before.get(key) != identity[key]]
        if other:
            os.close(lock)
            raise PomonaError(
                f"{path} holds the unfinished reconstruction of other {other[0]}; give those again to "
                "go on with it, remove it to start anew, or choose another --out"
            )
        work = cls(path, lock)
        if not begun:
            shutil.rmtree(work.mixture, ignore_errors=True)  # nobody knows of what
            try:
                write_json(known, identity)
            except BaseException:
                work.__exit__()
                raise
        return work

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        if not self.mixture.is_dir():
            self.remove()  # there is nothing to go on from
        os.close(self._lock)

    @property
    def mixture(self) -> Path:
        """Where the mixture is before retraining."""
        return self.path / "mixture"

    def save(self, state: StageState, losses: Tensor) -> None:
        """Make this step the one to go on from."""
        tensors = {"losses": losses, "step": torch.tensor(state.moments.step)}
        parts = {
            "router": state.routers,
            "parameter": state.parameters,
            "first": state.moments.first,
            "second": state.moments.second,
        }
        for part, values in parts.items():
            tensors |= {f"{part}.{place:06d}": value for place, value in enumerate(values)}
        write_tensors(self.path / "training.safetensors", tensors, {"stage": state.stage})

    def load(self) -> tuple[StageState | None, Tensor]:
        """Return the last saved step and the losses up to it; nothing for a new workspace."""
        path = self.path / "training.safetensors"
        if not path.is_file():
            return None, torch.zeros(0)
        tensors = read_tensors(path)

        def part(name: str) -> list[Tensor]:
            return [tensors[key] for key in sorted(tensors) if key.startswith(f"{name}.")]

        moments = Moments(int(tensors["step"]), part("first"), part("second"))
        stage = metadata(path)["stage"]
        return StageState(stage, part("router"), part("parameter"), moments), tensors["losses"]

    def remove(self) -> None:
        """The result stands; nothing here is needed any more."""
        shutil.rmtree(self.path, ignore_errors=True)
