"""Sums under masks with real processes, of which one is killed between the steps of a round."""

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from running import Running

from pomona.artifacts.run import RunDirectory
from pomona.federation.clients import ClientData
from pomona.federation.local import LocalTraining
from pomona.federation.strategies import FedAvg
from pomona.pipelines.federate import federate
from pomona.recipe import dump

pytestmark = pytest.mark.processes
NAMES = ("apples", "pears", "plums")
SHARED = "shared/adapter_model.safetensors"


@pytest.fixture
def masked(settings, rows_dir: Path, tmp_path: Path):
    """Three sites, two rounds; the coordinator sees sums alone."""
    folder = tmp_path / "rows"
    folder.mkdir()
    for split in ("train", "test"):
        lines = (rows_dir / f"{split}.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        for i, name in enumerate(NAMES):
            own = [{**row, "category": name} for row in rows[i : i + 6]]
            text = "".join(json.dumps(row) + "\n" for row in own)
            (folder / f"{name}.{split}.jsonl").write_text(text)
    local = LocalTraining(steps=40, batch=2)
    data = ClientData(folder=folder)
    summed = replace(settings, secure_aggregation=True, strategy=FedAvg(), rounds=2, cohort=1)
    return replace(summed, data=data, local=local)


@pytest.fixture
def running(masked, tmp_path: Path) -> Iterator[Running]:
    with Running(masked, tmp_path / "across", tmp_path / "rows") as processes:
        yield processes


def assert_the_same(masked, running: Running, tmp_path: Path) -> None:
    with RunDirectory.open(tmp_path / "alone", dump(masked), {"method": "x", "seed": 0}) as run:
        federate(masked, run, device="cpu")
    theirs = running.folder / "run" / SHARED
    assert (tmp_path / "alone" / SHARED).read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize("after", ["mask keys", "mask shares", "train"])
def test_a_site_is_killed_between_two_steps(masked, running, tmp_path, after):
    """It comes back with the masks that it had, because they are drawn of a secret in its state."""
    coordinator = running.serve("--quorum", "1")
    for name in NAMES:
        running.join(name)
    pears = running.processes[-2]
    pears.wait_for(f"{after} of round 1: ")
    pears.kill()
    pears.end()
    time.sleep(0.5)
    running.join("pears")
    assert coordinator.end() == 0, coordinator.said
    assert_the_same(masked, running, tmp_path)


@pytest.mark.parametrize("after", ["mask keys", "train", "open masks"])
def test_the_coordinator_is_killed_between_two_steps(masked, running, tmp_path, after):
    """A round that was not opened begins anew; one that was is opened again for the same sites."""
    coordinator = running.serve("--quorum", "1")
    sites = [running.join(name) for name in NAMES]
    sites[1].wait_for(f"{after} of round 1: ")
    coordinator.kill()
    coordinator.end()
    again = running.serve("--quorum", "1")
    assert again.end() == 0, again.said
    assert_the_same(masked, running, tmp_path)
