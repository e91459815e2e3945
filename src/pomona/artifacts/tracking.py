"""Telling figures to an experiment tracker while they are measured, through accelerate's own trackers."""

import hashlib
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.tracking import GeneralTracker, TensorBoardTracker, TrackioTracker, WandBTracker

from pomona.errors import PomonaError
from pomona.progress import NONE, Figures, Progress, Tell, to_all

_PROJECT = "pomona"


def _tensorboard(folder: Path) -> GeneralTracker:
    return TensorBoardTracker("tensorboard", folder)


def _wandb(folder: Path) -> GeneralTracker:
    folder.mkdir(parents=True, exist_ok=True)
    same = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    told = {"dir": str(folder), "name": folder.name, "id": same, "resume": "allow"}
    return WandBTracker(_PROJECT, **told)


def _trackio(folder: Path) -> GeneralTracker:
    return TrackioTracker(_PROJECT, name=folder.name, resume="allow")


TRACKERS: Mapping[str, Callable[[Path], GeneralTracker]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
}


@contextmanager
def tracked(
    names: Sequence[str], folder: Path, settings: Mapping[str, Any], tell: Tell
) -> Generator[Progress]:
    """Yield what tells the figures of every stage to trackers, by name; `settings` go with them.

    TensorBoard and W&B write under `folder`, which names the experiment too; trackio has a folder of its own.
    A tracker that fails on the way is told and left out: the work goes on. Raises `PomonaError` for one that is
    not known, not installed, or does not start.
    """
    for name in names:
        if name not in TRACKERS:
            raise PomonaError(f'there is no tracker "{name}"; there are {", ".join(TRACKERS)}')
    PartialState(cpu=True)  # which accelerate's trackers ask whether to speak
    running: list[_Tracked] = []
    try:
        for name in names:
            running.append(_Tracked(name, _started(name, folder, settings), tell))
        yield to_all(*running)
    finally:
        for own in running:
            own.close()


def _started(name: str, folder: Path, settings: Mapping[str, Any]) -> GeneralTracker:
    try:
        with redirect_stdout(sys.stderr):
            tracker = TRACKERS[name](folder)
            tracker.start()
            tracker.store_init_configuration(flat(settings))
    except ImportError as error:
        raise PomonaError(
            f"{name} is not installed; pip install 'pomona[{name}]', or leave --log out"
        ) from error
    except Exception as error:  # whatever a tracker finds wrong with its account or its disk
        raise PomonaError(
            f"{name} does not start: {str(error).strip() or type(error).__name__}"
        ) from error
    return tracker


class _Tracked:
    """Hears figures for one tracker."""

    def __init__(self, name: str, tracker: GeneralTracker, tell: Tell):
        self.name, self.tracker, self.tell = name, tracker, tell
        self.failed = False

    def __call__(self, stage: str, done: int, total: int, figures: Figures = NONE, /) -> None:
        if not figures or self.failed:
            return
        told = {f"{stage}/{name}": value for name, value in figures.items()}
        step = done if self.name == "tensorboard" else None  # elsewhere all stages count as one
        if step is None:
            told[f"{stage}/done"] = done
        self._do(lambda: self.tracker.log(told, step=step))

    def close(self) -> None:
        if not self.failed:
            self._do(self.tracker.finish)

    def _do(self, what: Callable[[], object]) -> None:
        try:
            with redirect_stdout(sys.stderr):  # trackio talks
                what()
        except Exception as error:  # figures are in the run folder all the same
            self.failed = True
            self.tell(f"{self.name} is left out from now on: {error}")


def flat(settings: Mapping[str, Any], above: str = "") -> dict[str, str | int | float | bool]:
    """Return settings as `local.steps` → value; what is no number or word is written out."""
    found: dict[str, str | int | float | bool] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{above}{key}.")
        else:
            found[above + key] = value if isinstance(value, int | float | str) else repr(value)
    return found
