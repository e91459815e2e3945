"""Flower's simulation (`flwr run`, Ray) of what `peft_loop` does, tuned to the machine or with its defaults."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pomona.models.lora import LoRA

from .peft_loop import Padded

APP = Path(__file__).resolve().parent / "flower_app"
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
DEFAULT_CPUS = 2
"""What Flower gives a client where nothing is set (flwr 1.42, `client-resources-num-cpus`)."""
LONGEST = 1800.0
"""Seconds that a simulation may take."""


@dataclass(frozen=True)
class Simulated:
    """What a simulation gave: every round's seconds, those before and after all rounds, the first round."""

    seconds: list[float]
    """Of each round, from the sampling of clients to their mean; the first one starts the workers."""
    around: float
    """What `flwr run` took beyond its rounds."""
    mean: Mapping[str, Tensor]
    losses: Sequence[Sequence[float]]


@dataclass(frozen=True)
class Flower:
    """A SuperLink that simulates, and the folder that it lives in."""

    home: Path
    environment: Mapping[str, str]

    def rounds(
        self,
        model: Path,
        lora: LoRA,
        shared: Mapping[str, Tensor],
        clients: Sequence[Sequence[Padded]],
        rate: float,
        count: int,
        threads: int,
        tuned: bool,
    ) -> Simulated:
        """Train the same rounds `count` times over, each from the mean of the one before.

        Args:
            model: Checkpoint folder.
            lora: Rank, alpha and targets of the adapters.
            shared: The adapter all clients begin with, as PEFT names it.
            clients: Every client's batches.
            rate: AdamW's learning rate.
            count: How many rounds.
            threads: Of the processor, for all clients together.
            tuned: As many clients at once as threads, each in a process of one thread that keeps its model.
                Else as Flower is when nothing is set, and as its examples are written: a client is given two
                threads, and loads the model for every round.

        Raises:
            RuntimeError: the simulation failed, or a client of it.
        """
        with tempfile.TemporaryDirectory(dir=self.home) as name:
            folder = Path(name)
            about = {"model": str(model.resolve()), "rate": rate}
            cpus = 1 if tuned else DEFAULT_CPUS
            about |= {"threads": min(cpus, threads), "keeps_model": tuned}
            about |= {"rank": lora.rank, "alpha": lora.alpha, "targets": list(lora.targets)}
            (folder / "work.json").write_text(json.dumps(about), "utf-8")
            torch.save(dict(shared), folder / "shared.pt")
            for number, batches in enumerate(clients):
                torch.save([dict(batch) for batch in batches], folder / f"{number}.pt")
            began = time.perf_counter()
            said = self._run(folder, len(clients), count, cpus, max(threads, cpus))
            took = time.perf_counter() - began
            if not (folder / "found.pt").exists():
                raise RuntimeError(f"Flower's simulation gave nothing; it said:\n{said[-3000:]}")
            found = torch.load(folder / "found.pt")
        if found["failed"]:
            raise RuntimeError(f"{found['failed']} clients failed under Flower:\n{said[-3000:]}")
        around = took - sum(found["seconds"])
        return Simulated(found["seconds"], around, found["mean"], found["losses"])

    def _run(self, folder: Path, clients: int, rounds: int, cpus: int, all_cpus: int) -> str:
        config = f'folder="{folder}" clients={clients} rounds={rounds}'
        federation = f"num-supernodes={clients} client-resources-num-cpus={cpus} "
        federation += f"init-args-num-cpus={all_cpus}"
        command = [program("flwr"), "run", str(APP), "benchmark", "--stream"]
        command += ["--run-config", config, "--federation-config", federation]
        done = subprocess.run(
            command,
            env=dict(self.environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=LONGEST,
            cwd=self.home,
        )
        return done.stdout


@contextmanager
def flower() -> Iterator[Flower]:
    """Start a SuperLink of one's own on a free port; end it and what it started with the block."""
    with tempfile.TemporaryDirectory(prefix="flower-") as name:
        home, port = Path(name), free_port()
        address = f'address = "127.0.0.1:{port}"\ninsecure = true\n'
        (home / "config.toml").write_text(f"[superlink.benchmark]\n{address}", "utf-8")
        paths = [str(APP.parent.parent), str(APP), os.environ.get("PYTHONPATH", "")]
        programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, **QUIET, "FLWR_HOME": str(home), "PATH": programs}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        command = [program("flower-superlink"), "--insecure", "--simulation"]
        command += ["--host", "127.0.0.1", "--port", str(port)]
        with (home / "superlink.log").open("w") as log:
            link = subprocess.Popen(
                command, env=environment, cwd=home, stdout=log, stderr=log, start_new_session=True
            )
        try:
            wait_for(port, link, home / "superlink.log")
            yield Flower(home, environment)
        finally:
            with suppress(ProcessLookupError):  # it may have ended by itself
                os.killpg(link.pid, signal.SIGTERM)
            try:
                link.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(link.pid, signal.SIGKILL)
                link.wait()


def program(name: str) -> str:
    program = Path(sys.executable).parent / name
    if not program.exists():
        raise RuntimeError(
            f"{name} is not installed beside {sys.executable}; install the extra `peers`, or leave Flower out "
            "with --without-flower"
        )
    return str(program)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def wait_for(port: int, link: subprocess.Popen[bytes], log: Path, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and link.poll() is None:
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise RuntimeError(f"Flower's SuperLink did not start: {log.read_text('utf-8')[-2000:]}")
