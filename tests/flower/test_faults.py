"""What happens to real machines, done to real processes: the federation ends as if nothing had happened."""

import json
import os
import re
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from shutil import copytree, which
from socket import create_connection, socket

import pytest
from running import Running

from pomona.artifacts.run import RunDirectory
from pomona.federation.clients import ClientData
from pomona.federation.local import LocalTraining
from pomona.flower.keys import make_keys
from pomona.pipelines.federate import federate
from pomona.recipe import dump

pytestmark = pytest.mark.processes
SHARED = "shared/adapter_model.safetensors"
NAMES = ("apples", "pears")


@pytest.fixture(scope="module")
def dealt(rows_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of two clients as sites have them, a file each."""
    folder = tmp_path_factory.mktemp("dealt")
    for split in ("train", "test"):
        rows = [json.loads(line) for line in (rows_dir / f"{split}.jsonl").read_text().splitlines()]
        for name in NAMES:
            own = [json.dumps(row) + "\n" for row in rows if row["category"] == name]
            (folder / f"{name}.{split}.jsonl").write_text("".join(own), "utf-8")
    return folder


@pytest.fixture
def slow(settings, dealt: Path):
    """A federation whose rounds take a second or two: time enough for something to happen."""
    local = LocalTraining(steps=40, batch=2)
    evaluation = replace(settings.evaluation, every=9)
    data = ClientData(folder=dealt)
    return replace(settings, data=data, cohort=1, local=local, evaluation=evaluation)


@pytest.fixture
def undisturbed(slow, tmp_path: Path) -> Path:
    """The same federation in one process."""
    with RunDirectory.open(tmp_path / "alone", dump(slow), {"method": "x", "seed": 0}) as run:
        federate(slow, run, device="cpu")
    return tmp_path / "alone"


@pytest.fixture
def running(slow, dealt: Path, tmp_path: Path) -> Iterator[Running]:
    with Running(slow, tmp_path / "across", dealt) as processes:
        yield processes


def assert_as_if_nothing(undisturbed: Path, running: Running) -> None:
    """Shared weights and everybody's own are the bytes of the undisturbed federation."""
    ours = running.folder / "run"
    assert (undisturbed / SHARED).read_bytes() == (ours / SHARED).read_bytes()
    for name in NAMES:
        part = f"clients/{name}/graft/graft.safetensors"
        assert (undisturbed / part).read_bytes() == (
            running.folder / name / "run" / part
        ).read_bytes()
    lines = [json.loads(line) for line in (ours / "metrics.jsonl").read_text().splitlines()]
    trained = [(line["round"], line["client"]) for line in lines if line["model"] == "training"]
    assert sorted(trained) == [(round_, name) for round_ in (1, 2, 3) for name in NAMES]


def test_with_keys_and_tls(slow, dealt, undisturbed, tmp_path):
    made = make_keys(tmp_path / "keys", ["127.0.0.1"], [*NAMES, "strangers"])
    assert made == ["authority", "coordinator", *NAMES, "strangers"]
    (tmp_path / "keys/coordinator/sites/strangers.pub").unlink()
    rows = Path(copytree(dealt, tmp_path / "rows"))
    for split in ("train", "test"):
        (rows / f"strangers.{split}.jsonl").write_text((dealt / f"pears.{split}.jsonl").read_text())
    with Running(slow, tmp_path / "across", rows, tmp_path / "keys") as running:
        coordinator = running.serve()
        stranger = running.join("strangers")
        assert stranger.end() == 2
        assert "does not know this site's key" in stranger.said
        assert "Traceback" not in stranger.said
        sites = [running.join(name) for name in NAMES]
        assert coordinator.end() == 0, coordinator.said
        assert [site.end() for site in sites] == [0, 0]
        assert all("the federation is over" in site.said for site in sites)
        assert_as_if_nothing(undisturbed, running)
        status = json.loads((running.folder / "run/status.json").read_text())
        assert status["state"] == "finished"
        assert all(own["received"] > 0 for own in status["sites"].values())


WRONG_CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>

static long apart(void) { return atol(getenv("APART")); }

int clock_gettime(clockid_t clock, struct timespec *now) {
    int (*real)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(clock, now);
    if (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE) now->tv_sec += apart();
    return failed;
}

int gettimeofday(struct timeval *now, void *zone) {
    int (*real)(struct timeval *, void *) = dlsym(RTLD_NEXT, "gettimeofday");
    int failed = real(now, zone);
    now->tv_sec += apart();
    return failed;
}

time_t time(time_t *kept) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (kept) *kept = now.tv_sec;
    return now.tv_sec;
}
"""


@pytest.fixture(scope="module")
def wrong_clock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What makes the wall clock of a process wrong, and leaves alone those that measure spans."""
    compiler = which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    folder = tmp_path_factory.mktemp("clock")
    (folder / "wrong.c").write_text(WRONG_CLOCK)
    made = [compiler, "-shared", "-fPIC", "-o", str(folder / "wrong.so"), str(folder / "wrong.c")]
    subprocess.run([*made, "-ldl"], check=True)
    return folder / "wrong.so"


@pytest.mark.parametrize("apart", [10, 300, -600])
def test_clocks_are_apart(slow, dealt, undisturbed, tmp_path, wrong_clock, apart):
    """A site that is a little behind takes part; one that is not says so and ends, and goes on when mended."""
    make_keys(tmp_path / "keys", ["127.0.0.1"], NAMES)

    def at(seconds: int) -> dict[str, str]:
        return {**os.environ, "LD_PRELOAD": str(wrong_clock), "APART": str(seconds)}

    with Running(slow, tmp_path / "across", dealt, tmp_path / "keys") as running:
        coordinator = running.serve("--quorum", "1")
        running.join("apples", env=at(-10))
        coordinator.wait_for("listening on")
        wrong = running.join("pears", env=at(apart))
        assert wrong.end() == 2, wrong.said
        told = " ".join(wrong.said.split())
        seconds = re.search(r"the clocks of this site and of \S+ are (\d+) seconds apart", told)
        assert seconds is not None, told
        assert abs(int(seconds[1]) - abs(apart)) <= 3
        assert "Traceback" not in told
        running.join("pears")
        assert coordinator.end() == 0, coordinator.said
        assert_as_if_nothing(undisturbed, running)


@pytest.mark.parametrize("when", ["before it has answered", "after it has answered"])
def test_a_site_is_killed(running, undisturbed, when):
    coordinator = running.serve("--quorum", "1")
    for name in NAMES:
        running.join(name)
    pears = running.processes[-1]
    if when == "after it has answered":
        pears.wait_for("train of round 2: update")
    else:
        pears.wait_for("train of round 1: update")
        time.sleep(0.3)
    pears.kill()
    worker = running.worker_of("pears")
    pears.end()
    for _ in range(200):  # the worker notices that the other end has gone
        if not Path(f"/proc/{worker}").exists():
            break
        time.sleep(0.1)
    assert not Path(f"/proc/{worker}").exists()
    running.join("pears")
    assert coordinator.end() == 0, coordinator.said
    assert_as_if_nothing(undisturbed, running)


def test_a_worker_is_killed(running, undisturbed):
    coordinator = running.serve("--quorum", "1")
    pears = [running.join(name) for name in NAMES][-1]
    pears.wait_for("train of round 1: update")
    time.sleep(0.3)
    os.kill(running.worker_of("pears"), signal.SIGKILL)
    assert coordinator.end() == 0, coordinator.said
    assert "the worker was killed (out of memory?); it is started anew" in pears.said
    assert_as_if_nothing(undisturbed, running)


@pytest.mark.parametrize("when", ["in a round", "between rounds"])
def test_the_coordinator_is_killed(running, undisturbed, when):
    coordinator = running.serve("--quorum", "1")
    sites = [running.join(name) for name in NAMES]
    coordinator.wait_for("round 2 0/2" if when == "in a round" else "rounds 1/3")
    coordinator.kill()
    coordinator.end()
    time.sleep(3)
    assert all(site.popen.poll() is None for site in sites)
    again = running.serve("--quorum", "1")
    assert again.end() == 0, again.said
    assert [site.end() for site in sites] == [0, 0]
    assert_as_if_nothing(undisturbed, running)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_everybody_is_stopped_and_goes_on(running, undisturbed, number):
    coordinator = running.serve("--quorum", "1")
    sites = [running.join(name) for name in NAMES]
    coordinator.wait_for("round 2 0/2")
    for process in (coordinator, *sites):
        process.kill(number)
    assert coordinator.end(60) == 130
    codes = {site.end(60) for site in sites}
    assert codes == ({0} if number == signal.SIGTERM else {130})
    for process in (coordinator, *sites):
        assert "Traceback" not in process.said
    coordinator = running.serve("--quorum", "1")
    for name in NAMES:
        running.join(name)
    assert coordinator.end() == 0, coordinator.said
    assert_as_if_nothing(undisturbed, running)


def test_a_site_that_hangs_is_not_waited_for_for_ever(running):
    coordinator = running.serve("--deadline", "8", "--retries", "3")
    pears = [running.join(name) for name in NAMES][-1]
    pears.wait_for("train of round 1: update")
    time.sleep(0.3)
    os.kill(running.worker_of("pears"), signal.SIGSTOP)
    coordinator.wait_for("rounds 3/3")
    os.kill(running.worker_of("pears"), signal.SIGCONT)  # its answer to round 2 comes too late
    assert coordinator.end() == 0, coordinator.said
    lines = (running.folder / "run/metrics.jsonl").read_text().splitlines()
    trained = [
        (line["round"], line["client"])
        for line in map(json.loads, lines)
        if line["model"] == "training"
    ]
    assert sorted(trained) == [(1, "apples"), (1, "pears"), (2, "apples"), (3, "apples")]


def test_too_few_answers_end_in_a_sentence_and_the_round_is_done_later(running, undisturbed):
    coordinator = running.serve("--quorum", "1", "--deadline", "25", "--retries", "1")
    pears = [running.join(name) for name in NAMES][-1]
    coordinator.wait_for("round 2 0/2")
    pears.kill()
    assert coordinator.end() == 2
    assert "1 of 2 sites have answered and 2 are needed; missing: pears; they are asked again" in (
        coordinator.said
    )
    assert "error: round 2: 1 of 2 sites have answered and 2 are needed; start" in coordinator.said
    assert not (running.folder / "run/results.json").exists()
    running.join("pears")
    coordinator = running.serve("--quorum", "1")
    assert coordinator.end() == 0, coordinator.said
    assert_as_if_nothing(undisturbed, running)


class Cable:
    """A TCP proxy that can be cut: connections are reset, and new ones refused, until it is mended."""

    def __init__(self, port: int):
        self.to, self.whole = port, True
        self.pairs: list[tuple[socket, socket]] = []
        self.listener = socket()
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen()
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self.listener.accept()
                if not self.whole:
                    near.close()
                    continue
                far = create_connection(("127.0.0.1", self.to))
            except OSError:
                continue
            self.pairs.append((near, far))
            for a, b in ((near, far), (far, near)):
                threading.Thread(target=self._carry, args=(a, b), daemon=True).start()

    def _carry(self, a: socket, b: socket) -> None:
        try:
            while data := a.recv(1 << 16):
                b.sendall(data)
        except OSError:
            pass
        for end in (a, b):
            end.close()

    def cut(self) -> None:
        self.whole = False
        for pair in self.pairs:
            for end in pair:
                with suppress(OSError):
                    end.shutdown(2)
        self.pairs.clear()


@pytest.mark.parametrize("when", ["while it trains", "before it is asked"])
def test_the_network_is_cut_and_comes_back(running, undisturbed, when):
    cable = Cable(running.port)
    coordinator = running.serve("--quorum", "1")
    coordinator.wait_for("listening on")
    running.join("apples")
    pears = running.join("pears", port=cable.port)
    pears.wait_for("hello: here" if when == "before it is asked" else "train of round 1: update")
    time.sleep(0.0 if when == "before it is asked" else 0.3)
    cable.cut()
    time.sleep(5)
    cable.whole = True
    assert coordinator.end() == 0, coordinator.said
    assert "trying again" in pears.said
    assert_as_if_nothing(undisturbed, running)


@pytest.mark.parametrize("where", ["pears", "serve"])
def test_a_full_disk_is_told_and_nothing_is_lost(running, undisturbed, where):
    """A limit on the size of files is met like a disk without room; the log may not grow either."""

    def little_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    full = {"preexec_fn": little_room}
    short = ("--quorum", "1", "--deadline", "20", "--retries", "0")
    coordinator = running.serve(*short, **(full if where == "serve" else {}))
    for name in NAMES:
        running.join(name, **(full if where == name else {}))
    assert coordinator.end() == 2
    said = coordinator.said
    assert "cannot write" in said or "File too large" in said
    assert "Traceback" not in said
    if where == "pears":
        pears = running.processes[-1]
        pears.kill(signal.SIGTERM)
        pears.end()
        running.join("pears")
    again = running.serve("--quorum", "1")
    assert again.end() == 0, again.said
    assert_as_if_nothing(undisturbed, running)
