"""Laws of reconstruction: what splitting, pruning and assembling must preserve."""

from pathlib import Path

import pytest
import torch
from conftest import word_text
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as fn
from transformers import AutoModelForCausalLM

from pomona.reconstruct import ReconstructSettings, reconstruct
from pomona.reconstruction.calibrate import merge, stats_of
from pomona.reconstruction.compensate import NoCompensation, Ridge
from pomona.reconstruction.router import Centroids, Fitted, RandomRouter

DOMAINS = {name: [word_text(i * 50 + j, 40) for j in range(20)] for i, name in enumerate("abcd")}
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


@pytest.mark.parametrize("router", [Fitted(), Centroids(), RandomRouter()])
@pytest.mark.parametrize("compensation", [Ridge(), NoCompensation()])
def test_full_keep_reproduces_the_dense_logits(dense_dir, tmp_path, router, compensation):
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
