"""Laws of reconstruction: what splitting, pruning and assembling must preserve."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import save_model, word_text
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as fn
from transformers import AutoModelForCausalLM

from pomona.errors import PomonaError
from pomona.models.placement import Placement
from pomona.pipelines.reconstruct import ReconstructSettings, reconstruct
from pomona.reconstruction.calibrate import merge, stats_of
from pomona.reconstruction.compensate import Bias, NoCompensation, Ridge
from pomona.reconstruction.planners import ActivationClusters, RandomSplit, TopChannels
from pomona.reconstruction.router import Centroids, Fitted, RandomRouter
from pomona.reconstruction.scores import Taylor
from pomona.reconstruction.specialise import Specialise

DOMAINS = {name: [word_text(i * 50 + j, 40) for j in range(20)] for i, name in enumerate("abcd")}
AS_DEALT = Specialise(rounds=0)
ADDED = {
    "compensation": NoCompensation(),
    "specialise": AS_DEALT,
}  # parts that are summed have nothing to make up for
SMALL = ReconstructSettings(experts=2, keep=0.5, windows=8, length=32, affinity_windows=4)


@given(
    width=st.integers(2, 24),
    experts=st.integers(1, 5),
    tokens=st.integers(1, 9),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_disjoint_experts_with_unit_gates_sum_to_the_dense_ffn(width, experts, tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    gate, up, down, x = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((width, 6), (width, 6), (6, width), (tokens, 6))
    )

    def ffn(keep):
        return (fn.silu(x @ gate[keep].T) * (x @ up[keep].T)) @ down[:, keep].T

    dense = ffn(torch.arange(width))
    parts = torch.randperm(width, generator=generator).tensor_split(experts)
    total = sum(ffn(part) for part in parts)
    torch.testing.assert_close(total, dense, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("router", "compensation", "rounds"),
    [
        *(
            (r, c, 0)
            for r in (Fitted(), Centroids(), RandomRouter())
            for c in (Ridge(), NoCompensation())
        ),
        (Fitted(), Ridge(), 2),
    ],
)
def test_full_keep_reproduces_the_dense_logits(dense_dir, tmp_path, router, compensation, rounds):
    """Every expert is the whole FFN, so whatever the router says the weights sum to one."""
    full = ReconstructSettings(
        experts=3,
        active=2,
        keep=1.0,
        windows=4,
        length=32,
        affinity_windows=2,
        router=router,
        compensation=compensation,
        specialise=Specialise(rounds),
    )
    reconstruct(dense_dir, DOMAINS, tmp_path / "out", full)
    tokens = torch.randint(3, 300, (3, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        dense = AutoModelForCausalLM.from_pretrained(dense_dir)(tokens).logits
        mixture = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(tokens).logits
    torch.testing.assert_close(mixture, dense, rtol=1e-4, atol=1e-5)


@given(cuts=st.lists(st.integers(1, 39), max_size=4), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_merged_statistics_equal_those_of_all_tokens(cuts, seed):
    x = torch.randn(40, 7, generator=torch.Generator().manual_seed(seed)) * 3 + 100
    parts = [part for part in x.tensor_split(sorted(cuts)) if len(part)]
    merged = stats_of(parts[0])
    for part in parts[1:]:
        merged = merge(merged, stats_of(part))
    assert merged.count == 40
    wide = x.double()
    torch.testing.assert_close(merged.variance_F, wide.var(0, unbiased=False), rtol=1e-9, atol=0)
    torch.testing.assert_close(merged.mean_square_F, wide.square().mean(0), rtol=1e-12, atol=0)


def test_same_seed_same_bytes(dense_dir, tmp_path):
    def made(name: str, seed: int) -> dict[str, bytes]:
        out: Path = tmp_path / name
        reconstruct(dense_dir, DOMAINS, out, ReconstructSettings(**{**vars(SMALL), "seed": seed}))
        return {f.name: f.read_bytes() for f in sorted(out.rglob("*")) if f.is_file()}

    first, again, other = made("a", 0), made("b", 0), made("c", 5)
    assert first == again
    assert first["model.safetensors"] != other["model.safetensors"]


def logits_of(folder: Path) -> torch.Tensor:
    tokens = torch.randint(3, 300, (3, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2", "Qwen3"])
@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"experts": 1, "active": 1, "keep": 1.0}, None),
        ({"experts": 1, "active": 1, "keep": 1.0, "compensation": Bias()}, "no home for a bias"),
        ({"experts": 3, "active": 2, "keep": 1.0}, None),
        ({"experts": 3, "active": 1, "keep": 0.5, "planner": TopChannels(shared=0.5)}, "shared 0"),
        ({"experts": 4, "active": 4, "keep": 0.25, "planner": RandomSplit()} | ADDED, None),
        (
            {"experts": 2, "active": 2, "keep": 0.25, "planner": ActivationClusters(shared=0.5)}
            | ADDED,
            "shared 0",
        ),
    ],
    ids=["pruned", "biased", "mixture", "shared", "split", "clusters"],
)
def test_nothing_pruned_reproduces_the_dense_logits_in_every_family(tmp_path, kind, given, says):
    """Whole experts, a shared half beside the other half, or parts that add up to the whole."""
    window = {"sliding_window": None} if kind == "Mistral" else {}
    dense = save_model(tmp_path / "dense", kind, intermediate_size=64, **window)
    router = {
        "router": RandomRouter(0.0),
        "specialise": AS_DEALT,
    }  # equal weights: the parts' outputs are simply added
    made = replace(SMALL, **({"grouping": "all"} | router | given))
    refused = says == "shared 0" and kind == "Qwen3"
    refused |= says == "no home for a bias" and kind != "Llama"
    if refused:
        with pytest.raises(PomonaError, match=says):
            reconstruct(dense, DOMAINS, tmp_path / "out", made)
        assert not (tmp_path / "out").exists()
        return
    reconstruct(dense, DOMAINS, tmp_path / "out", made)
    ours, theirs = logits_of(tmp_path / "out"), logits_of(dense)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


def test_a_pruned_llama_holds_flaps_bias(dense_dir, tmp_path):
    """The bias makes up for the mean of what is gone: pruned with it, the model is nearer to dense."""
    pruned = replace(SMALL, experts=1, active=1, keep=0.5)
    for name, compensation in (("bias", Bias()), ("none", NoCompensation())):
        reconstruct(dense_dir, DOMAINS, tmp_path / name, replace(pruned, compensation=compensation))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "bias")
    assert model.config.model_type == "llama"
    assert model.config.intermediate_size == 32
    assert model.model.layers[0].mlp.down_proj.bias.abs().min() > 0
    assert model.model.layers[0].mlp.gate_proj.bias.abs().max() == 0
    dense = logits_of(dense_dir)
    error = {n: float((logits_of(tmp_path / n) - dense).square().mean()) for n in ("bias", "none")}
    assert error["bias"] != error["none"]


@pytest.mark.parametrize("source", ["few", "corpus"])
def test_fewer_domains_than_experts_are_split(dense_dir, tmp_path, source):
    domains = dict(list(DOMAINS.items())[: 2 if source == "few" else 1])
    settings = replace(SMALL, experts=4, split_domains=source == "few")
    made = reconstruct(dense_dir, domains, tmp_path / "out", settings)
    names = [name for group in made.plan.groups for name in group]
    assert sorted(names) == (
        ["a 1", "a 2", "b 1", "b 2"] if source == "few" else ["a 1", "a 2", "a 3", "a 4"]
    )
    assert logits_of(tmp_path / "out").isfinite().all()


@pytest.mark.parametrize("kind", ["Llama", "Qwen2"])
@pytest.mark.parametrize("planner", [TopChannels(), TopChannels(shared=0.3)])
def test_ragged_widths_are_padded_and_the_result_runs(tmp_path, kind, planner):
    """43 channels are no multiple of what grouped products take; zeros beside them change nothing."""
    dense = save_model(tmp_path / "dense", kind, intermediate_size=172)
    settings = replace(SMALL, keep=0.25, planner=planner)
    made = reconstruct(dense, DOMAINS, tmp_path / "out", settings)
    assert made.plan.keep_LEW.shape[2] == 43
    assert made.sizes.width == 48
    assert made.sizes.shared % 8 == 0
    logits = logits_of(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", experts_implementation="eager")
    tokens = torch.randint(3, 300, (3, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(logits, model(tokens).logits, rtol=1e-4, atol=1e-4)


def test_a_ragged_whole_is_still_the_dense_model(tmp_path):
    dense = save_model(tmp_path / "dense", "Llama", intermediate_size=172)
    settings = replace(SMALL, keep=0.7, grouping="all", planner=TopChannels(shared=0.3))
    made = reconstruct(dense, DOMAINS, tmp_path / "out", settings)
    assert (made.sizes.width, made.sizes.shared) == (120, 56)
    torch.testing.assert_close(logits_of(tmp_path / "out"), logits_of(dense), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    "change", [{}, {"active": 1, "affinity": "scores"}, {"experts": 1, "active": 1}]
)
def test_where_weights_lie_changes_no_byte(dense_dir, tmp_path, change):
    """Offloaded and layer by layer, or in memory and all at once: the same checkpoint."""
    settings = replace(SMALL, **change)
    for name, placement in (
        ("whole", Placement()),
        ("layer by layer", Placement("cpu", offload=False, layers=1)),
        ("offloaded", Placement(offload=True, layers=1)),
    ):
        reconstruct(dense_dir, DOMAINS, tmp_path / name, settings, placement=placement)
    expected = (tmp_path / "whole/model.safetensors").read_bytes()
    for name in ("layer by layer", "offloaded"):
        assert (tmp_path / name / "model.safetensors").read_bytes() == expected
        plans = [(tmp_path / n / "reconstruction/plan.json").read_text() for n in ("whole", name)]
        assert plans[0] == plans[1]


def test_placements_that_are_not_there_are_refused(dense_dir, tmp_path):
    for field, says in (({"device": "tpu"}, 'device "tpu"'), ({"layers": -1}, "layers -1")):
        with pytest.raises(PomonaError, match=says):
            Placement(**field)
    taylor = replace(SMALL, score=Taylor())
    with pytest.raises(PomonaError, match="backward pass"):
        reconstruct(dense_dir, DOMAINS, tmp_path / "out", taylor, placement=Placement(offload=True))
    assert list(tmp_path.iterdir()) == []
