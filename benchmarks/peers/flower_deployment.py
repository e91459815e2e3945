"""Flower's own deployment on this machine: a SuperLink, SuperNodes and an app, as its documentation has it."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from .flower_loop import LONGEST, QUIET, free_port, program, wait_for

APP = Path(__file__).resolve().parent / "empty_app"


def rounds_of_nothing(nodes: int, rounds: int, model: Path | None = None) -> list[float]:
    """Return the seconds of rounds in which every node answers at once, after loading `model` if any.

    Raises `RuntimeError` with what Flower said where it fails.
    """
    with tempfile.TemporaryDirectory(prefix="flower-") as name, ExitStack() as running:
        home, port = Path(name), free_port()
        programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, **QUIET, "PATH": programs}
        link = ["flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(port)]
        link += ["--database", str(home / "link.db")]
        log = running.enter_context(_running(home, "superlink", link, environment))
        wait_for(port, log[0], log[1])
        for node in range(nodes):
            words = ["flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}"]
            words += ["--port", str(free_port())]
            words += ["--node-config", f"partition-id={node} num-partitions={nodes}"]
            running.enter_context(_running(home, f"supernode-{node}", words, environment))
        out = home / "seconds.json"
        own = home / "flwr"
        own.mkdir()
        address = f'address = "127.0.0.1:{port}"\ninsecure = true\n'
        (own / "config.toml").write_text(f"[superlink.benchmark]\n{address}", "utf-8")
        config = f'out="{out}" nodes={nodes} rounds={rounds} model="{model or ""}"'
        done = subprocess.run(
            [program("flwr"), "run", str(APP), "benchmark", "--stream", "--run-config", config],
            env={**environment, "FLWR_HOME": str(own)},
            cwd=home,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=LONGEST,
        )
        if not out.exists():
            said = "".join(path.read_text("utf-8")[-1500:] for path in home.glob("*.log"))
            raise RuntimeError(
                f"Flower's rounds gave nothing; it said:\n{done.stdout[-3000:]}{said}"
            )
        return json.loads(out.read_text("utf-8"))


@contextmanager
def _running(
    home: Path, name: str, words: list[str], environment: Mapping[str, str]
) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """Run a program with a Flower folder of its own; end it and what it started with the block."""
    own = home / name
    own.mkdir()
    path = home / f"{name}.log"
    with path.open("w") as log:
        process = subprocess.Popen(
            [program(words[0]), *words[1:]],
            env={**environment, "FLWR_HOME": str(own)},
            cwd=home,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield process, path
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
