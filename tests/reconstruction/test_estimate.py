"""The estimate against what is then made."""

from dataclasses import replace

import pytest
from conftest import save_model
from laws.test_reconstruction_laws import ADDED, DOMAINS, SMALL
from transformers import AutoModelForCausalLM

from pomona.errors import PomonaError
from pomona.reconstruct import preview, reconstruct
from pomona.reconstruction.compensate import Bias
from pomona.reconstruction.planners import ActivationClusters, RandomSplit, TopChannels
from pomona.reconstruction.retraining import Retraining

CASES = {
    "mixture": {},
    "shared": {"active": 1, "keep": 0.25, "planner": TopChannels(shared=0.25)},
    "pruned": {"experts": 1, "active": 1},
    "flap": {"experts": 1, "active": 1, "compensation": Bias()},
    "odd widths": {"keep": 0.3, "active": 1},
    "split": {"planner": RandomSplit()} | ADDED,
    "clusters": {"keep": 0.25, "planner": ActivationClusters(shared=0.5)} | ADDED,
}


FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("case", CASES)
def test_sizes_are_those_of_what_is_made(tmp_path, case, kind):
    """Whatever a container adds: Qwen2-MoE always has a shared expert and its gate, FLAP has biases."""
    if (case in ("shared", "clusters") and kind == "Qwen3") or (case == "flap" and kind != "Llama"):
        pytest.skip(f"{kind} has no home for it")
    window = {"sliding_window": None} if kind == "Mistral" else {}
    dense_dir = save_model(tmp_path / "dense", kind, intermediate_size=64, **window)
    settings = replace(SMALL, affinity="scores", **CASES[case])
    told = preview(dense_dir, list(DOMAINS), settings)
    made = reconstruct(dense_dir, DOMAINS, tmp_path / "out", settings)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert told.total == sum(parameter.numel() for parameter in opened.parameters())
    assert (told.container, told.sizes) == (made.container, made.sizes)
    assert (told.total, told.active, told.dense) == (
        made.total_parameters,
        made.active_parameters,
        made.dense_parameters,
    )
    assert told.flops - told.dense_flops == 2 * (told.active - told.dense)
    assert f"{made.total_parameters:,} parameters" in str(told)


def test_retraining_and_affinity_cost_what_they_say(dense_dir):
    plain = preview(dense_dir, list(DOMAINS), SMALL)
    scores = preview(dense_dir, list(DOMAINS), replace(SMALL, affinity="scores"))
    windows = 16 * SMALL.affinity_windows * SMALL.length
    assert plain.work_flops - scores.work_flops == windows * plain.dense_flops
    how = Retraining(length=32)
    more = preview(dense_dir, list(DOMAINS), replace(SMALL, retrain=how))
    per_token = 3 * plain.flops + plain.dense_flops
    assert more.work_flops - plain.work_flops == how.experts.tokens * per_token
    assert more.peak_bytes >= plain.peak_bytes
    with pytest.raises(PomonaError, match="cannot make 5 experts"):
        preview(dense_dir, list(DOMAINS), replace(SMALL, experts=5))


def test_the_command_tells_and_makes_nothing(dense_dir, tmp_path, monkeypatch, capsys):
    from pomona.cli.app import main

    for name, texts in DOMAINS.items():
        (tmp_path / f"{name}.txt").write_text("\n\n".join(texts))
    given = ["reconstruct", dense_dir, "--domains", tmp_path, "--experts", 4, "--dry-run"]
    command = ["pomona", *map(str, given), "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert "FLOPs per token" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
