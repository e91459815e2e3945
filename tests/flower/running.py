"""A federation of real processes on loopback: started by a test, and ended by their own ids."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from loopback import free_port

from pomona.federation.settings import FederateSettings
from pomona.recipe import dump

_PATIENCE = 240.0


class Process:
    """One command, with all that it prints in a file."""

    def __init__(self, command: list[str], log: Path, **options):
        self.log = log
        with log.open("ab") as out:
            self.popen = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True, **options
            )

    @property
    def said(self) -> str:
        return self.log.read_text("utf-8", "replace")

    def wait_for(self, text: str, times: int = 1, seconds: float = _PATIENCE) -> None:
        """Wait until something has been printed so often."""
        end = time.monotonic() + seconds
        while self.said.count(text) < times:
            if self.popen.poll() is not None and self.said.count(text) < times:
                raise AssertionError(f"it ended before it said {text!r}:\n{self.said}")
            assert time.monotonic() < end, f"it did not say {text!r}:\n{self.said}"
            time.sleep(0.02)

    def kill(self, number: int = signal.SIGKILL) -> None:
        self.popen.send_signal(number)

    def end(self, seconds: float = _PATIENCE) -> int:
        return self.popen.wait(seconds)


class Running:
    """A coordinator and sites, each with a folder; `dealt` has every site's rows (NAME.train.jsonl …)."""

    def __init__(
        self, settings: FederateSettings, folder: Path, dealt: Path, keys: Path | None = None
    ):
        from dataclasses import replace

        self.settings, self.folder, self.dealt, self.keys = settings, folder, dealt, keys
        self.port = free_port()
        self.names = sorted(path.name.split(".")[0] for path in dealt.glob("*.train.jsonl"))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.toml").write_text(dump(replace(settings, data=None)), "utf-8")
        self.processes: list[Process] = []

    def _start(self, name: str, *words: str, **options) -> Process:
        command = [sys.executable, "-m", "pomona", *words]
        process = Process(command, self.folder / f"{name}.txt", **options)
        self.processes.append(process)
        return process

    def serve(self, *words: str, **options) -> Process:
        security = ["--insecure", *(w for n in self.names for w in ("--site", n))]
        if self.keys is not None:
            security = ["--keys", str(self.keys / "coordinator")]
        where = ["--out", str(self.folder / "run"), "--port", str(self.port)]
        recipe = str(self.folder / "recipe.toml")
        return self._start("serve", "serve", recipe, *where, *security, *words, **options)

    def join(self, name: str, *words: str, port: int | None = None, **options) -> Process:
        security = ["--insecure", "--name", name]
        if self.keys is not None:
            security = ["--keys", str(self.keys / "sites" / name)]
        rows = ["--data", str(self.dealt / f"{name}.train.jsonl")]
        rows += ["--test", str(self.dealt / f"{name}.test.jsonl")]
        where = ["--coordinator", f"127.0.0.1:{port or self.port}"]
        kept = ["--model", str(self.settings.model), "--state", str(self.folder / name)]
        return self._start(name, "join", *where, *rows, *kept, *security, *words, **options)

    def worker_of(self, name: str) -> int:
        """Return the id of a site's worker, as the site says it."""
        said = [p for p in self.processes if p.log.name == f"{name}.txt"][-1].said
        return int(said.split(", worker ")[-1].split(")")[0])

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *_error: object) -> None:
        for process in self.processes:
            if process.popen.poll() is None:
                process.kill(signal.SIGCONT)
                process.kill(signal.SIGTERM)
        for process in self.processes:
            try:
                process.end(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.popen.pid, signal.SIGKILL)
