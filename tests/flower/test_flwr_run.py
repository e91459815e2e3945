"""The same federation started by Flower itself: `flwr run` on a SuperLink that simulates, with Ray."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from socket import socket

import pytest
from loopback import free_port

from pomona.artifacts.run import RunDirectory
from pomona.pipelines.federate import federate
from pomona.recipe import dump

pytestmark = pytest.mark.processes
SHARED = "shared/adapter_model.safetensors"


def program(name: str) -> str:
    return str(Path(sys.executable).parent / name)


@pytest.fixture
def superlink(tmp_path):
    """A SuperLink of one's own on a free port, ended with all that it has started."""
    home, port = tmp_path / "flower", free_port()
    home.mkdir()
    told = f'[superlink.ours]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    (home / "config.toml").write_text(told, "utf-8")
    environment = {
        **os.environ,
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    command = [program("flower-superlink"), "--insecure", "--simulation", "--port", str(port)]
    with (home / "log").open("wb") as log:
        link = subprocess.Popen(
            command, env=environment, cwd=home, stdout=log, stderr=log, start_new_session=True
        )
    try:
        end = time.monotonic() + 120
        while time.monotonic() < end:
            with socket() as tried:
                if tried.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        yield environment, home
    finally:
        os.killpg(link.pid, signal.SIGTERM)
        try:
            link.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(link.pid, signal.SIGKILL)
            link.wait()


@pytest.mark.skipif(
    importlib.util.find_spec("ray") is None,
    reason="Ray is not installed; pip install -c constraints.txt 'flwr[simulation]'",
)
def test_flwr_run_ends_with_the_shared_weights_of_a_simulation(settings, superlink, tmp_path):
    alone = replace(settings, cohort=1)
    with RunDirectory.open(tmp_path / "alone", dump(alone), {"method": "x", "seed": 0}) as run:
        federate(alone, run, device="cpu")
    (tmp_path / "recipe.toml").write_text(dump(settings), "utf-8")
    environment, home = superlink
    where = subprocess.run(
        [sys.executable, "-m", "pomona.flower.app"], capture_output=True, text=True, check=True
    ).stdout.strip()
    config = " ".join(
        f'{key}="{tmp_path / path}"'
        for key, path in (("recipe", "recipe.toml"), ("out", "run"), ("states", "states"))
    )
    nodes = "num-supernodes=3 client-resources-num-cpus=1 init-args-num-cpus=2"
    command = [program("flwr"), "run", where, "ours", "--stream"]
    command += ["--run-config", config, "--federation-config", nodes]
    done = subprocess.run(
        command, env=environment, cwd=home, capture_output=True, text=True, check=False, timeout=600
    )
    assert (tmp_path / "run/results.json").is_file(), done.stdout[-4000:] + done.stderr[-2000:]
    ours, theirs = ((tmp_path / path / SHARED).read_bytes() for path in ("alone", "run"))
    assert ours == theirs
    for name in settings.load():
        part = f"clients/{name}/graft/graft.safetensors"
        own = tmp_path / "states" / name / "run" / part
        assert own.read_bytes() == (tmp_path / "alone" / part).read_bytes()
