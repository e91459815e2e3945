"""The run directory: everything a federation has done, and enough to go on after any interruption.

Rounds are committed in `checkpoint/` (`artifacts.checkpoint`). Metrics are appended and cut back to their
committed length on resume, so that an interrupted run ends with the same bytes as one that was not.
"""

import json
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Event
from typing import Any, Self

from pydantic_core import from_json

from pomona.artifacts.about import read_about, write_about
from pomona.artifacts.checkpoint import Checkpoint, Snapshot
from pomona.artifacts.inputs import Inputs, difference
from pomona.artifacts.results import FORGETTING, SPEED, TASKS, SpeedFile, read_results
from pomona.errors import PomonaError
from pomona.evaluation.speed import Speed
from pomona.federation.strategies import ServerState
from pomona.federation.update import ClientState
from pomona.files import (
    cannot_write,
    damaged,
    digest_of,
    hold,
    read_as,
    write_json,
    write_text,
)

_CHECKPOINT = "checkpoint"
_KEPT = ("recipe.toml", "inputs.json", "metrics.jsonl", "answers.jsonl")


@dataclass(frozen=True)
class RunDirectory:
    """One federation on disk, held by one command at a time.

    `RunDirectory.open` makes it or goes on with it; leaving its `with` block lets it go. An error that leaves
    it before anything was computed takes away what was put there: another recipe may use the folder.
    """

    path: Path
    _lock: int = field(repr=False, compare=False)
    _before: frozenset[Path] | None = field(default=None, repr=False, compare=False)
    _stays: Event = field(default_factory=Event, repr=False, compare=False)

    @classmethod
    def open(cls, path: Path, recipe: str, about: Mapping[str, Any]) -> Self:
        """Open `path` for the run that `recipe` (TOML text) describes.

        Raises `PomonaError` when the folder holds another run or something else, or is in use.
        """
        new = not path.exists()
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise cannot_write(path, error) from error
        hold(lock, path)
        try:
            before = None if new else frozenset(path.iterdir())
            cls._prepare(path, recipe, about)
        except BaseException:
            os.close(lock)
            raise
        return cls(path, lock, before)

    @staticmethod
    def _prepare(path: Path, recipe: str, about: Mapping[str, Any]) -> None:
        """Clear what a killed process left half-written, and see whose folder it is."""
        if _unbegun(path):
            write_about(path / "run.json", about)
            write_text(path / "recipe.toml", recipe)
        _check_same(path, recipe)
        for partial in path.rglob(".*.partial"):  # only now is it known to be ours
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
        if (path / "results.json").is_file():
            shutil.rmtree(path / _CHECKPOINT, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_error: object) -> None:
        begun = (self.path / _CHECKPOINT).exists() or self.finished or self._stays.is_set()
        if kind is not None and not begun:
            self._forget()
        self.close()

    def close(self) -> None:
        """Let the folder go."""
        os.close(self._lock)

    def stay(self) -> None:
        """Have the folder stay though nothing is computed: others know by now which run this is."""
        self._stays.set()

    def _forget(self) -> None:
        """Leave the folder as it was found."""
        for path in set(self.path.iterdir()) - (self._before or frozenset()):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if self._before is None:
            self.path.rmdir()

    @property
    def finished(self) -> bool:
        """Whether the final results are written."""
        return (self.path / "results.json").is_file()

    def claim(self, inputs: Inputs) -> None:
        """Remember what the run is computed from; a run that was begun goes on only from the same.

        Raises `PomonaError` naming the file or client that has changed.
        """
        path = self.path / "inputs.json"
        if not self.finished and not self.checkpoint.begun:
            write_json(path, asdict(inputs))  # nothing is computed yet
            return
        if not path.is_file():
            raise PomonaError(f"{path} is missing; restore it or choose a new folder")
        changed = difference(read_as(path, Inputs), inputs)
        if changed is not None:
            raise PomonaError(
                f"{changed} since the run in {self.path} began; restore what it was, or choose a new "
                "folder to start anew"
            )

    @property
    def checkpoint(self) -> Checkpoint:
        """The last committed round on disk."""
        return Checkpoint(self.path / _CHECKPOINT)

    def snapshot(self, clients: Collection[str]) -> Snapshot | None:
        """Return the last committed round, or None for a new run; forget what came after it.

        Raises `PomonaError` when what is there is damaged, or does not tell of every one of `clients`.
        """
        if not self.checkpoint.begun:
            (self.path / "metrics.jsonl").unlink(missing_ok=True)
            return None
        snapshot = self.checkpoint.read(clients)
        self._cut_metrics(snapshot.metrics_bytes)
        return snapshot

    def begin(
        self,
        server: ServerState,
        experts: Mapping[str, Sequence[Sequence[int]]],
        metrics: Sequence[Mapping[str, Any]],
    ) -> Snapshot:
        """Make round 0 final: what the server has, and the experts that clients' grafts will grow from."""
        self.checkpoint.choose(experts)
        return self.commit(Snapshot(0, server, experts), 0, server, {}, metrics)

    def commit(
        self,
        previous: Snapshot,
        round_: int,
        server: ServerState,
        clients: Mapping[str, ClientState],
        metrics: Sequence[Mapping[str, Any]],
    ) -> Snapshot:
        """Make a round final with what was measured in it."""
        length = self._append("metrics.jsonl", metrics)
        return self.checkpoint.commit(previous, round_, server, clients, length)

    def metrics(self) -> list[dict[str, Any]]:
        """Return what was measured so far."""
        path = self.path / "metrics.jsonl"
        return [from_json(line) for line in path.read_bytes().splitlines()]

    def answers(self) -> list[dict[str, Any]]:
        """Return the final evaluation row by row."""
        path = self.path / "answers.jsonl"
        return [from_json(line) for line in path.read_bytes().splitlines()]

    def add_metrics(self, metrics: Sequence[Mapping[str, Any]]) -> None:
        """Append what is measured after the last round; until the run is finished it is made anew."""
        self._append("metrics.jsonl", metrics)

    def note_time(self, entry: Mapping[str, Any]) -> None:
        """Append to timings.jsonl, the one file that differs between equal runs."""
        self._append("timings.jsonl", [entry])

    def write_answers(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the final evaluation row by row."""
        self._write_lines("answers.jsonl", rows)

    def write_forgetting(self, windows: Sequence[Mapping[str, Any]]) -> None:
        """Write the losses of held-out text, window by window."""
        self._write_lines(FORGETTING, windows)

    def write_tasks(self, metrics: Sequence[Mapping[str, Any]]) -> None:
        """Write what the harness measured, metric by metric."""
        self._write_lines(TASKS, metrics)

    def write_speed(self, client: str, speeds: Mapping[str, Speed]) -> None:
        """Write how fast the base and a client's model generate; like all times, never twice the same."""
        timed = SpeedFile(client, dict(speeds))
        write_json(self.path / SPEED, asdict(timed))

    def finish(self, results: Mapping[str, Any]) -> dict[str, Any]:
        """Write the results, which makes the run finished, and drop the checkpoint.

        Returns them with the digests of the files they were drawn from, as they are read back.
        """
        kept = (*_KEPT, *(name for name in (FORGETTING, TASKS) if (self.path / name).is_file()))
        files = {name: digest_of(self.path / name) for name in kept}
        write_json(self.path / "results.json", {**results, "files": files})
        shutil.rmtree(self.path / _CHECKPOINT, ignore_errors=True)
        return self.results()

    def results(self) -> dict[str, Any]:
        """Return the final results of a finished run."""
        return read_results(self.path / "results.json")

    def _write_lines(self, name: str, lines: Sequence[Mapping[str, Any]]) -> None:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_text(self.path / name, text)

    def _cut_metrics(self, length: int) -> None:
        """Forget what was appended after the last committed round."""
        path = self.path / "metrics.jsonl"
        if not path.is_file() or path.stat().st_size < length:
            raise damaged(path, f"{length} bytes of it were committed")
        with path.open("r+b") as metrics:
            try:
                lines = [from_json(line) for line in metrics.read(length).splitlines()]
            except ValueError as error:
                raise damaged(path, error) from error
            if not all(isinstance(line, dict) for line in lines):
                raise damaged(path, "a line is not a JSON object")
            metrics.truncate(length)

    def _append(self, name: str, entries: Sequence[Mapping[str, Any]]) -> int:
        path = self.path / name
        try:
            with path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(e, ensure_ascii=False) + "\n" for e in entries)
                file.flush()
                os.fsync(file.fileno())
                return file.tell()
        except OSError as error:
            raise cannot_write(path, error) from error


def _unbegun(path: Path) -> bool:
    """Whether a folder is empty but for what a process killed at its very start has left."""
    early = {"run.json", ".run.json.partial", ".recipe.toml.partial"}
    return {entry.name for entry in path.iterdir()} <= early


def _check_same(path: Path, recipe: str) -> None:
    """A folder belongs to one recipe for good."""
    known, about = path / "recipe.toml", path / "run.json"
    if not about.is_file():
        raise PomonaError(f"{path} holds files that are no run; choose an empty or new folder")
    read_about(about)
    if not known.is_file():
        raise PomonaError(f"{known} is missing; restore it or choose a new folder")
    if known.read_bytes() != recipe.encode():
        raise PomonaError(
            f"{path} holds the run of another recipe ({known}); choose a new folder, or give "
            "that recipe to go on with it"
        )
