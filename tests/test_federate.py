"""The federation end to end: what it leaves behind, and that nothing interrupts it for good."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import now_and_then
from safetensors.torch import load_file, save
from transformers import AutoModelForCausalLM

from pomona.artifacts import checkpoint, publish, shared_format
from pomona.artifacts import run as run_module
from pomona.artifacts.graft_format import read_graft
from pomona.artifacts.run import RunDirectory
from pomona.errors import PomonaError
from pomona.federation.partition import Dirichlet
from pomona.federation.settings import FederateSettings
from pomona.federation.strategies import FedAvg, FedProx, LocalOnly
from pomona.models.peft_format import read_adapter
from pomona.pipelines.federate import federate
from pomona.progress import Tell, unheard
from pomona.recipe import dump

UNTIMED = {"timings.jsonl"}


def run(settings: FederateSettings, path: Path, tell: Tell = unheard) -> dict:
    with RunDirectory.open(path, dump(settings), {"method": settings.name, "seed": 0}) as directory:
        return federate(settings, directory, tell=tell)


def files_of(path: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name not in UNTIMED
    }


def test_a_run_leaves_what_it_promises(settings, tmp_path):
    results = run(settings, tmp_path / "run")
    assert set(files_of(tmp_path / "run")) == {
        "recipe.toml",
        "run.json",
        "inputs.json",
        "metrics.jsonl",
        "answers.jsonl",
        "results.json",
        "holdings.csv",
        "holdings.svg",
        "shared/adapter_config.json",
        "shared/adapter_model.safetensors",
        "shared/pomona.json",
        *(
            f"clients/{name}/graft/{file}"
            for name in ("apples", "pears", "plums")
            for file in ("graft.safetensors", "graft_config.json", "pomona.json")
        ),
    }
    assert list(results["base"]["clients"]) == ["apples", "pears", "plums"]
    metrics = [
        json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    ]
    assert [m["round"] for m in metrics if m["model"] == "base"] == [0, 0, 0]
    assert {m["round"] for m in metrics if m["model"] == "personal"} == {2, 3}
    assert {m["round"] for m in metrics if m["model"] == "training"} == {1, 2, 3}
    _, shared = read_adapter(tmp_path / "run/shared")
    message = len(save(shared))
    sent = [m for m in metrics if m["model"] == "communication"]
    assert all(m["sent_bytes"] == m["received_bytes"] == 3 * message for m in sent)
    assert all(m["sent"] == dict.fromkeys(("apples", "pears", "plums"), message) for m in sent)
    assert all(m["received"] == m["sent"] for m in sent)
    moved = [t for name, t in shared.items() if "lora_B" in name]
    assert moved
    assert all(t.abs().max() > 0 for t in moved)


def test_saved_personal_model_is_the_one_that_was_evaluated(settings, tmp_path):
    """The published code saved untrained private weights; ours saves exactly what it measured."""
    from pomona.artifacts.personal import PersonalModel
    from pomona.pipelines.evaluate import on_rows

    run(settings, tmp_path / "run")
    answers = [json.loads(x) for x in (tmp_path / "run/answers.jsonl").read_text().splitlines()]
    own = [a for a in answers if a["client"] == "pears" and a["model"] == "personal"]
    lines = Path(settings.data.test).read_text().splitlines()
    rows = tmp_path / "pears.jsonl"
    rows.write_text("\n".join(x for x in lines if json.loads(x)["category"] == "pears"))
    personal = PersonalModel(
        settings.model, tmp_path / "run/shared", tmp_path / "run/clients/pears/graft"
    )
    figures = on_rows(personal, rows, limit=3, length=96, new_tokens=4)[rows.name]
    assert figures["loss"] == pytest.approx(
        sum(a["nats"] for a in own) / sum(a["tokens"] for a in own), abs=1e-6
    )
    graft, tensors = read_graft(tmp_path / "run/clients/pears/graft")
    assert graft.form == "delta"
    assert all(t.abs().max() > 0 for name, t in tensors.items() if "lora_B" in name)


def test_shared_part_loads_in_peft_with_identical_logits(settings, tmp_path):
    from peft import PeftModel

    from pomona.federation.cohort import FrozenBase
    from pomona.federation.update import ClientState

    run(replace(settings, graft=None), tmp_path / "run")
    tokens = torch.randint(3, 300, (2, 20), generator=torch.Generator().manual_seed(1))
    plain = AutoModelForCausalLM.from_pretrained(settings.model).eval()
    lora, tensors = read_adapter(tmp_path / "run/shared")
    with torch.no_grad():
        untouched = plain(tokens).logits
        with FrozenBase(plain, lora).attach_one(ClientState(tensors)):
            ours = plain(tokens).logits
        theirs = PeftModel.from_pretrained(plain, tmp_path / "run/shared")(tokens).logits
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, untouched)


def test_same_seed_same_bytes_and_another_seed_others(settings, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(replace(settings, seed=seed), tmp_path / name)
    a, b, c = (files_of(tmp_path / name) for name in "abc")
    assert a == b
    assert a["shared/adapter_model.safetensors"] != c["shared/adapter_model.safetensors"]


@pytest.mark.parametrize("strategy", [FedAvg(), FedProx(0.1), LocalOnly()])
@pytest.mark.parametrize("grafted", [True, False])
def test_every_strategy_with_and_without_grafts(settings, tmp_path, strategy, grafted):
    graft = settings.graft if grafted else None
    results = run(replace(settings, strategy=strategy, graft=graft, rounds=1), tmp_path / "run")
    alone = isinstance(strategy, LocalOnly)
    assert (results["shared"] is None) == alone
    assert (results["personal"] is None) == (not alone and not grafted)
    assert (tmp_path / "run/shared").exists() != alone
    assert (tmp_path / "run/clients/pears/adapter").exists() == alone
    assert (tmp_path / "run/clients/pears/graft").exists() == grafted
    sent = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert all((m["sent_bytes"] == 0) == alone for m in sent if m["model"] == "communication")


def test_cohort_size_changes_nothing_but_rounding(settings, tmp_path):
    for name, cohort in (("one", 1), ("all", 16)):
        run(replace(settings, cohort=cohort), tmp_path / name)
    one, all_ = (
        load_file(tmp_path / name / "shared/adapter_model.safetensors") for name in ("one", "all")
    )
    for name, value in one.items():
        torch.testing.assert_close(value, all_[name], rtol=1e-3, atol=1e-4)


def test_only_some_clients_take_part(settings, tmp_path):
    run(replace(settings, fraction=0.4, rounds=2), tmp_path / "run")
    metrics = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    per_round = [
        [m["client"] for m in metrics if m["model"] == "training" and m["round"] == r]
        for r in (1, 2)
    ]
    assert [len(clients) for clients in per_round] == [2, 2]


class Stopped(BaseException):
    """Stands for the process ending right there."""


WRITES = [
    (checkpoint, "write_tensors"),
    (checkpoint, "write_json"),
    (run_module, "write_json"),
    (run_module, "write_text"),
    (shared_format, "write_adapter"),
    (publish, "write_graft"),
]


@contextmanager
def stopped_after(
    writes: int, monkeypatch: pytest.MonkeyPatch, places: Sequence[tuple[ModuleType, str]]
) -> Generator[None]:
    """Raise `Stopped` once that many of these writing functions' calls have been made; it has to happen."""
    count = 0

    def stopping(function):
        def wrapped(*args, **kwargs):
            nonlocal count
            function(*args, **kwargs)
            count += 1
            if count == writes:
                raise Stopped

        return wrapped

    with monkeypatch.context() as patch:
        for module, name in places:
            patch.setattr(module, name, stopping(getattr(module, name)))
        with pytest.raises(Stopped):
            yield


@pytest.mark.parametrize("writes", now_and_then([1, 11, 22], [2, 5, 6, 7, 14, 20, 24]))
def test_interrupted_after_any_write_and_resumed_equals_uninterrupted(
    settings, tmp_path, monkeypatch, writes
):
    run(settings, tmp_path / "whole")
    with stopped_after(writes, monkeypatch, WRITES):
        run(settings, tmp_path / "cut")
    run(settings, tmp_path / "cut")
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("kills", now_and_then([(3,)], [(1, 5)]))
def test_killed_and_started_again_with_the_same_command(settings, tmp_path, capfd, kills):
    """SIGKILL at several instants of a real process; the last start runs to its end."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(dump(replace(settings, rounds=8)), encoding="utf-8")

    def start(out: Path) -> subprocess.Popen:
        command = [sys.executable, "-m", "pomona", "federate", str(recipe), "--out", str(out)]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    cut = tmp_path / "run"
    for rounds in kills:
        process = start(cut)
        state = cut / "checkpoint/state.json"
        for _ in range(1200):
            if process.poll() is not None:
                break
            if state.exists() and json.loads(state.read_text())["round"] >= rounds:
                break
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert not (cut / "results.json").exists()
    assert start(cut).wait() == 0
    done = files_of(cut)
    cut.rename(tmp_path / "cut")
    assert start(cut).wait() == 0
    assert files_of(cut) == done


def test_a_finished_run_is_not_run_again(settings, tmp_path):
    first = run(settings, tmp_path / "run")
    before = files_of(tmp_path / "run")
    assert run(settings, tmp_path / "run") == first
    assert files_of(tmp_path / "run") == before


def test_a_directory_that_holds_another_run_is_refused(settings, tmp_path):
    run(settings, tmp_path / "run")
    before = files_of(tmp_path / "run")
    with pytest.raises(PomonaError, match="another recipe"):
        run(replace(settings, rounds=9), tmp_path / "run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").write_text("mine")
    with pytest.raises(PomonaError, match="no run"):
        run(settings, tmp_path / "other")
    assert files_of(tmp_path / "run") == before
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["notes.txt"]


def test_a_directory_in_use_is_refused(settings, tmp_path):
    with RunDirectory.open(tmp_path, dump(settings), {"method": "m", "seed": 0}):
        with pytest.raises(PomonaError, match="in use"):
            RunDirectory.open(tmp_path, dump(settings), {"method": "m", "seed": 0})


def test_a_client_without_rows_is_named(settings, tmp_path):
    data = replace(settings.data, partition=Dirichlet(clients=30, alpha=0.05, minimum=0))
    with pytest.raises(PomonaError, match=r'client "client-\d\d" has no train rows'):
        run(replace(settings, data=data), tmp_path / "run")


def test_context_longer_than_the_models_is_refused(settings, tmp_path):
    with pytest.raises(PomonaError, match="max_length 1000 is longer than the context"):
        run(replace(settings, max_length=1000), tmp_path / "run")


def test_a_dense_model_takes_no_graft(settings, dense_dir, tmp_path):
    with pytest.raises(PomonaError, match="no mixture-of-experts layer"):
        run(replace(settings, model=str(dense_dir)), tmp_path / "run")
    plain = replace(settings, model=str(dense_dir), graft=None, rounds=1)
    assert run(plain, tmp_path / "plain")["shared"] is not None


def test_the_router_of_the_base_never_moves(settings, tmp_path):
    before = files_of(Path(settings.model))
    run(settings, tmp_path / "run")
    assert files_of(Path(settings.model)) == before


def test_a_folder_that_is_no_run_is_left_as_it_was(settings, tmp_path):
    (tmp_path / "sub").mkdir()
    for name in (".thesis.partial", "sub/.notes.partial"):
        (tmp_path / name).write_text("precious")
    with pytest.raises(PomonaError, match="holds files that are no run"):
        run(settings, tmp_path)
    assert (tmp_path / ".thesis.partial").read_text() == "precious"
    assert (tmp_path / "sub/.notes.partial").read_text() == "precious"


def test_a_start_that_was_killed_at_once_is_started_anew(settings, tmp_path):
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut/.run.json.partial").write_text("{")
    (tmp_path / "cut/run.json").write_text('{"format": 1, "seed": 99}')
    run(settings, tmp_path / "cut")
    assert json.loads((tmp_path / "cut/run.json").read_text())["seed"] != 99
    assert not list((tmp_path / "cut").glob(".*"))


def test_private_state_goes_when_a_run_was_killed_at_its_very_end(settings, tmp_path):
    run(settings, tmp_path / "run")
    (tmp_path / "run/checkpoint").mkdir()
    (tmp_path / "run/checkpoint/state.json").write_text("{}")
    run(settings, tmp_path / "run")
    assert not (tmp_path / "run/checkpoint").exists()


def test_a_client_that_diverges_is_named_even_in_the_last_step(settings, tmp_path):
    wild = replace(settings.local, learning_rate=1e30, final_learning_rate=1e30, steps=1)
    with pytest.raises(
        PomonaError, match=r'client "apples".* (diverged in|not finite after) round 1'
    ):
        run(replace(settings, rounds=1, local=wild), tmp_path / "run")
    assert not (tmp_path / "run/results.json").exists()


@pytest.mark.parametrize(("mask", "mode"), [(0o077, 0o600), (0o022, 0o644), (0o002, 0o664)])
def test_every_file_has_the_mode_that_the_umask_says(settings, tmp_path, mask, mode):
    """Also the tensors: safetensors would write them for their owner alone."""
    before = os.umask(mask)
    try:
        run(replace(settings, rounds=1), tmp_path / "run")
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) == 7 + 2 + 3 + 3 * 3, files  # holdings.csv and .svg
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in files} == {
        path.name: oct(mode) for path in files
    }
