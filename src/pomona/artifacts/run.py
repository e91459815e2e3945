"""The run directory: everything a federation has done, and enough to go on after any interruption.

A round is committed by replacing one small file, `checkpoint/state.json`; whatever a killed process
left beside it is not referred to and is overwritten or removed. Metrics are appended and cut back to
their committed length on resume, so that an interrupted run ends with the same bytes as one that was
not.
"""

import json
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

from torch import Tensor

import pomona
from pomona.artifacts.graft_format import write_graft
from pomona.errors import PomonaError
from pomona.federation.graft import Graft
from pomona.federation.strategies import ServerState
from pomona.federation.update import ClientState
from pomona.files import cannot_write, damaged, hold, read_object, write_json, write_text
from pomona.models.lora import LoRA
from pomona.models.peft_format import write_adapter
from pomona.models.weights import read_tensors, write_tensors

FORMAT = 1


@dataclass(frozen=True)
class Snapshot:
    """The last committed round."""

    round: int
    server: ServerState
    clients: Mapping[str, str] = field(repr=False)


@dataclass(frozen=True)
class RunDirectory:
    """One federation on disk, held by one command at a time.

    `RunDirectory.open` makes it or goes on with it; leaving its `with` block lets it go.
    """

    path: Path
    _lock: int = field(repr=False, compare=False)

    @classmethod
    def open(cls, path: Path, recipe: str, about: Mapping[str, Any]) -> Self:
        """Open `path` for the run that `recipe` (TOML text) describes.

        Raises `PomonaError` when the folder holds another run or something else, or is in use.
        """
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise cannot_write(path, error) from error
        hold(lock, path)
        try:
            cls._prepare(path, recipe, about)
        except BaseException:
            os.close(lock)
            raise
        return cls(path, lock)

    @staticmethod
    def _prepare(path: Path, recipe: str, about: Mapping[str, Any]) -> None:
        """Clear what a killed process left half-written, and see whose folder it is."""
        if _unbegun(path):
            write_json(path / "run.json", {"format": FORMAT, **_versions(), **about})
            write_text(path / "recipe.toml", recipe)
        _check_same(path, recipe)
        for partial in path.rglob(".*.partial"):  # only now is it known to be ours
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
        if (path / "results.json").is_file():
            shutil.rmtree(path / "checkpoint", ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        os.close(self._lock)

    @property
    def finished(self) -> bool:
        """Whether the final results are written."""
        return (self.path / "results.json").is_file()

    def snapshot(self) -> Snapshot | None:
        """Return the last committed round, or None for a new run; forget what came after it."""
        state = self._read_state()
        if state is None:
            (self.path / "metrics.jsonl").unlink(missing_ok=True)
            return None
        metrics_path = self.path / "metrics.jsonl"
        length = int(state["metrics_bytes"])
        if not metrics_path.is_file() or metrics_path.stat().st_size < length:
            raise damaged(metrics_path, f"{length} bytes of it were committed")
        with metrics_path.open("r+b") as metrics:
            metrics.truncate(length)
        tensors = read_tensors(self.path / "checkpoint" / state["server"])
        server = ServerState(_part(tensors, "shared"), _part(tensors, "memory"))
        return Snapshot(state["round"], server, state["clients"])

    def client(self, snapshot: Snapshot, name: str) -> ClientState:
        """Return a client's private state as of a snapshot."""
        tensors = read_tensors(self.path / "checkpoint" / snapshot.clients[name])
        return ClientState(_part(tensors, "adapter"), _part(tensors, "graft"))

    def commit(
        self,
        previous: Snapshot | None,
        round_: int,
        server: ServerState,
        clients: Mapping[str, ClientState],
        metrics: Sequence[Mapping[str, Any]],
    ) -> Snapshot:
        """Make a round final: new files first, then the one rename that makes them count."""
        folder = self.path / "checkpoint"
        files = dict(previous.clients) if previous else {}
        for name, state in clients.items():
            files[name] = f"{quote(name, safe='')}.{round_}.safetensors"
            tensors = _named("adapter", state.adapter) | _named("graft", state.graft)
            write_tensors(folder / files[name], tensors, {"round": str(round_)})
        server_file = f"server.{round_}.server.safetensors"
        write_tensors(
            folder / server_file,
            _named("shared", server.shared) | _named("memory", server.memory),
            {"round": str(round_)},
        )
        length = self._append("metrics.jsonl", metrics)
        state = {"round": round_, "metrics_bytes": length, "server": server_file, "clients": files}
        write_json(folder / "state.json", state)
        for stale in set(folder.iterdir()) - {folder / f for f in (*files.values(), server_file)}:
            if stale.name != "state.json":
                stale.unlink()
        return Snapshot(round_, server, files)

    def note_time(self, entry: Mapping[str, Any]) -> None:
        """Append to timings.jsonl, the one file that differs between equal runs."""
        self._append("timings.jsonl", [entry])

    def publish_shared(self, lora: LoRA, tensors: Mapping[str, Tensor], base: str) -> None:
        """Write the shared part as a PEFT adapter folder."""
        _replace_adapter(self.path / "shared", lora, tensors, base)

    def publish_client(
        self, name: str, state: ClientState, lora: LoRA, graft: Graft | None, base: str
    ) -> None:
        """Write what one client keeps: its graft folder and, if private, its adapter."""
        folder = self.path / "clients" / name
        if state.adapter:
            _replace_adapter(folder / "adapter", lora, state.adapter, base)
        if graft is not None:
            shutil.rmtree(folder / "graft", ignore_errors=True)
            write_graft(folder / "graft", graft, state.graft, base)

    def write_answers(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the final evaluation row by row."""
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_text(self.path / "answers.jsonl", text)

    def finish(self, results: Mapping[str, Any]) -> None:
        """Write the results, which makes the run finished, and drop the checkpoint."""
        write_json(self.path / "results.json", results)
        shutil.rmtree(self.path / "checkpoint", ignore_errors=True)

    def results(self) -> dict[str, Any]:
        """Return the final results of a finished run."""
        return read_object(self.path / "results.json")

    def _read_state(self) -> dict[str, Any] | None:
        path = self.path / "checkpoint" / "state.json"
        if not path.is_file():
            return None
        state = read_object(path)
        if not {"round", "metrics_bytes", "server", "clients"} <= state.keys():
            raise damaged(path, "it lacks what a committed round says")
        return state

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


def _replace_adapter(folder: Path, lora: LoRA, tensors: Mapping[str, Tensor], base: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    write_adapter(folder, lora, tensors, base)


def _named(part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{part}/{name}": value for name, value in tensors.items()}


def _part(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    prefix = f"{part}/"
    return {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}


def _unbegun(path: Path) -> bool:
    """Whether a folder is empty but for what a process killed at its very start has left."""
    early = {"run.json", ".run.json.partial", ".recipe.toml.partial"}
    return {entry.name for entry in path.iterdir()} <= early


def _check_same(path: Path, recipe: str) -> None:
    """A folder belongs to one recipe for good."""
    known, about = path / "recipe.toml", path / "run.json"
    if not about.is_file():
        raise PomonaError(f"{path} holds files that are no run; choose an empty or new folder")
    if read_object(about).get("format") != FORMAT:
        raise PomonaError(f"{path} was written by another version of Pomona; choose a new folder")
    if not known.is_file():
        raise PomonaError(f"{known} is missing; restore it or choose a new folder")
    if known.read_bytes() != recipe.encode():
        raise PomonaError(
            f"{path} holds the run of another recipe ({known}); choose a new folder, or give "
            "that recipe to go on with it"
        )


def _versions() -> dict[str, str]:
    packages = ("torch", "transformers", "peft", "safetensors", "numpy")
    return {
        "pomona": pomona.__version__,
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }
