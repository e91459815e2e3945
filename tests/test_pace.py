"""What `cohort = "auto"` and `experts = "auto"` choose, what that changes, and what memory allows."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from test_federate import WRITES, files_of, run, stopped_after
from transformers import PreTrainedModel

from pomona.errors import PomonaError
from pomona.federation.evaluation import Evaluation
from pomona.federation.local import LocalTraining
from pomona.pipelines.federate import pace as pace_module
from pomona.pipelines.federate.pace import Pace, Trial, free_bytes
from pomona.pipelines.federate.preview import cohort_memory

QUICK = Evaluation(every=9, rows=2, answers=1, new_tokens=2)


@pytest.fixture
def quick(settings):
    local = LocalTraining(steps=1, batch=2)
    return replace(settings, rounds=2, local=local, evaluation=QUICK)


def rates(monkeypatch, per_trial):
    """Let trials take what they are told; return what was tried."""
    tried = []

    def rate(federation, tasks):
        experts = federation.base.model.config._experts_implementation
        tried.append((len(tasks), experts.removeprefix("pomona_")))
        return per_trial[tried[-1]]

    monkeypatch.setattr(pace_module, "_rate", rate)
    return tried


def test_the_fastest_is_found_kept_and_what_was_asked_for_gives_the_same_bytes(
    quick, tmp_path, monkeypatch
):
    """Three clients: implementations at three, then sizes one, two, three with the best of them."""
    by_trial = {(3, name): rate for name, rate in (("grouped_mm", 10), ("batched_mm", 9))}
    by_trial |= {(3, "eager"): 12.0, (1, "eager"): 11.0, (2, "eager"): 12.0}
    tried = rates(monkeypatch, by_trial)
    auto = replace(quick, cohort="auto", experts="auto")
    run(auto, tmp_path / "a")
    sizes = [(1, "eager"), (2, "eager"), (3, "eager")]
    assert tried == [(3, "grouped_mm"), (3, "batched_mm"), (3, "eager"), *sizes]
    kept = json.loads((tmp_path / "a/pace.json").read_text("utf-8"))
    assert (kept["cohort"], kept["experts"]) == (2, "eager")
    assert [(t["cohort"], t["experts"]) for t in kept["trials"]] == tried
    run(replace(quick, cohort=2, experts="eager"), tmp_path / "b")
    assert not (tmp_path / "b/pace.json").exists()
    differs = {"run.json", "recipe.toml", "results.json", "timings.jsonl", "pace.json"}
    ours, theirs = (files_of(tmp_path / name) for name in "ab")
    assert {n: v for n, v in ours.items() if n not in differs} == {
        n: v for n, v in theirs.items() if n not in differs
    }
    monkeypatch.setattr(pace_module, "measured_pace", None)  # this machine knows
    run(replace(auto, seed=1), tmp_path / "c")
    assert json.loads((tmp_path / "c/pace.json").read_text("utf-8")) == kept


def test_a_run_goes_on_with_what_it_began_with(quick, tmp_path, monkeypatch):
    """Interrupted, on a machine that has forgotten and would choose otherwise."""
    monkeypatch.setenv("POMONA_CACHE", str(tmp_path / "cache"))
    auto = replace(quick, cohort="auto", rounds=3)
    rates(monkeypatch, {(1, "grouped_mm"): 5.0, (2, "grouped_mm"): 9.0, (3, "grouped_mm"): 1.0})
    run(auto, tmp_path / "whole")
    with stopped_after(6, monkeypatch, WRITES):
        run(auto, tmp_path / "broken")
    assert (tmp_path / "broken/checkpoint").is_dir()
    for known in (tmp_path / "cache/pace").iterdir():
        known.unlink()
    rates(monkeypatch, {(1, "grouped_mm"): 5, (2, "grouped_mm"): 1, (3, "grouped_mm"): 1})
    run(auto, tmp_path / "broken")
    ours, theirs = (files_of(tmp_path / name) for name in ("broken", "whole"))
    assert ours["pace.json"] == theirs["pace.json"]
    assert json.loads(ours["pace.json"])["cohort"] == 2
    for name in ("metrics.jsonl", "answers.jsonl"):
        assert ours[name] == theirs[name]


def test_a_larger_cohort_has_to_be_faster_and_two_that_are_not_end_it():
    def fastest(*rates):
        trials = [Trial(2**k, "eager", rate) for k, rate in enumerate(rates)]
        return pace_module._fastest(trials).cohort

    assert fastest(10.0) == 1
    assert fastest(10.0, 10.2, 10.29) == 1
    assert fastest(10.0, 10.4, 10.5) == 2
    assert fastest(10.0, 10.2, 10.4) == 4
    assert list(pace_module._sizes(1)) == [1]
    assert list(pace_module._sizes(5)) == [1, 2, 4, 5]
    assert list(pace_module._sizes(10_000)) == [1, 2, 4, 8, 16, 32, 64]


def test_memory_bounds_the_cohort_and_keeps_batched_products_out(quick, tmp_path, monkeypatch):
    monkeypatch.setenv("POMONA_CACHE", str(tmp_path / "cache"))
    auto = replace(quick, cohort="auto", experts="auto")
    each = cohort_memory(auto, 10, 1).training(False)
    assert cohort_memory(auto, 10, 2).training(False) > 1.5 * each
    tried = rates(monkeypatch, {(1, "grouped_mm"): 1.0, (1, "eager"): 1.0})
    monkeypatch.setattr(pace_module, "free_bytes", lambda device: 1000)
    run(replace(auto, rounds=1), tmp_path / "a")  # a single client trains, come what may
    assert tried == [(1, "grouped_mm"), (1, "eager"), (1, "grouped_mm")]
    free = 1.1 * each / pace_module._SHARE
    monkeypatch.setattr(pace_module, "free_bytes", lambda device: free)
    cpu = torch.device("cpu")
    assert [size for size in (1, 2, 4) if pace_module._fits(auto, 10, size, cpu)] == [1]


def test_trials_are_real_and_change_nothing(quick, tmp_path, monkeypatch):
    """No stand-in: whatever is chosen, the run is that of its choice."""
    monkeypatch.setenv("POMONA_CACHE", str(tmp_path / "cache"))
    run(replace(quick, cohort="auto", experts="auto"), tmp_path / "a")
    kept = json.loads((tmp_path / "a/pace.json").read_text("utf-8"))
    assert all(trial["tokens_per_second"] > 0 for trial in kept["trials"])
    chosen = replace(quick, cohort=kept["cohort"], experts=kept["experts"])
    run(chosen, tmp_path / "b")
    ours, theirs = (files_of(tmp_path / name)["metrics.jsonl"] for name in "ab")
    assert ours == theirs


def test_a_dense_model_has_no_experts_to_choose(quick, dense_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("POMONA_CACHE", str(tmp_path / "cache"))
    dense = replace(quick, model=str(dense_dir), graft=None, shared_expert=None, experts="auto")
    run(dense, tmp_path / "a")
    kept = json.loads((tmp_path / "a/pace.json").read_text("utf-8"))
    assert (kept["experts"], kept["trials"]) == ("default", [])


def test_an_implementation_that_is_not_there_is_refused(quick, tmp_path, monkeypatch):
    real = PreTrainedModel.set_experts_implementation

    def refuse(model, name):
        if name == "eager":
            raise ImportError("no such kernel")
        real(model, name)

    monkeypatch.setattr("transformers.PreTrainedModel.set_experts_implementation", refuse)
    with pytest.raises(PomonaError, match=r'experts = "eager" is not to be had .*no such kernel'):
        run(replace(quick, experts="eager"), tmp_path / "a")


def test_free_memory_is_some():
    assert 2**20 < free_bytes(torch.device("cpu")) < 2**50
    assert Pace(1, "eager").trials == []


PEAK = """
import sys, torch
torch.set_num_threads(1)
from dataclasses import replace
from pomona.data.examples import Example
from pomona.pipelines.federate.preview import cohort_memory
from pomona.federation.cohort import FrozenBase
from pomona.federation.graft import Graft
from pomona.federation.local import LocalTraining, train_cohort
from pomona.federation.settings import FederateSettings
from pomona.federation.stage import Task
from pomona.federation.strategies import FedAvg
from pomona.federation.update import ClientState
from pomona.models.experts import enable_checkpointing, find_expert_sites, freeze
from pomona.models.lora import LoRA
from pomona.models.packing import can_pack
from pomona.models.loading import load_model

folder, clients, length = sys.argv[1], 8, 256
local = LocalTraining(steps=1, batch=2)
settings = FederateSettings(
    folder, None, max_length=length, graft=Graft(rank=8), adapter=LoRA(rank=8), local=local
)
memory = cohort_memory(settings, 9, clients)
model = load_model(folder, "float32")
freeze(model)
base = FrozenBase(model, LoRA(rank=8), Graft(rank=8), tuple(find_expert_sites(model)))
base = replace(base, packs=can_pack(model, length))
generator = torch.Generator().manual_seed(0)
def row():
    return Example(tuple(torch.randint(3, 400, (length,), generator=generator).tolist()), 1)
tasks = [
    Task(
        f"c{c}",
        ClientState(base.init_adapter(0), base.init_graft(0, "c", [[c % 4]] * 4)),
        [row(), row()],
    )
    for c in range(clients)
]
def status(key):
    (line,) = (x for x in open("/proc/self/status") if x.startswith(key))
    return int(line.split()[1]) * 1024
rest = (local, FedAvg(), 0, 1, 1, 0)
train_cohort(base, tasks[:1], *rest)  # what libraries take once
for checkpointing in (False, True):
    if checkpointing:
        enable_checkpointing(model)
    before = status("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # the largest resident set begins anew
    train_cohort(base, tasks, *rest)
    print((status("VmHWM") - before) / memory.training(checkpointing))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the largest resident set from /proc")
def test_the_estimate_is_what_a_step_takes(tmp_path):
    """A process's largest resident set, against the estimate, where malloc holds back nothing.

    Of a step without activation checkpointing, then of one with it.
    """
    from transformers import MixtralConfig, MixtralForCausalLM

    MixtralForCausalLM(
        MixtralConfig(
            vocab_size=400,
            hidden_size=256,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            num_local_experts=4,
            num_experts_per_tok=2,
        )
    ).save_pretrained(tmp_path)
    command = [sys.executable, "-c", PEAK, str(tmp_path)]
    returning = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    env = {**os.environ, **returning}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    shares = [float(share) for share in done.stdout.split()]
    assert len(shares) == 2
    assert all(0.75 < share < 1.1 for share in shares), shares
