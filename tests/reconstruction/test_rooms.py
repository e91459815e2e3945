"""The rooms of reconstruction, each against a plain computation."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from pomona.errors import PomonaError
from pomona.evaluation.loss import perplexity, text_loss
from pomona.models.dense import LLAMA
from pomona.models.experts import freeze
from pomona.progress import silent
from pomona.reconstruction.affinity import DomainAffinity, perplexity_affinity, score_affinity
from pomona.reconstruction.calibrate import calibrate, stats_of
from pomona.reconstruction.cluster import cluster
from pomona.reconstruction.compensate import NoCompensation, Ridge, second_moments
from pomona.reconstruction.ffn import dense_model, keep_mask, observe, pruned, top_channels
from pomona.reconstruction.plan import ExpertPlan, plan_experts
from pomona.reconstruction.router import ROUTERS, Fitted, expert_errors
from pomona.reconstruction.scores import SCORES, WIFV, score_layers


@pytest.fixture
def dense(dense_dir):
    model = AutoModelForCausalLM.from_pretrained(dense_dir)
    freeze(model)
    return dense_model(model, LLAMA)


def windows(seed: int, rows: int = 6) -> torch.Tensor:
    return torch.randint(3, 300, (rows, 24), generator=torch.Generator().manual_seed(seed))


def seen(dense, tokens):
    kept = {}
    observe(dense, tokens, lambda layer, x, h, y: kept.setdefault(layer, []).append((x, h, y)))
    return {k: tuple(torch.cat(part) for part in zip(*v, strict=True)) for k, v in kept.items()}


def test_streamed_statistics_equal_the_whole(dense):
    tokens = windows(0, 40)  # three batches
    for layer, stats in enumerate(calibrate(dense, tokens)):
        _, h, _ = seen(dense, tokens)[layer]
        assert stats.count == tokens.numel()
        torch.testing.assert_close(stats.mean_F, h.double().mean(0), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(stats.variance_F, h.double().var(0, unbiased=False))


def test_scores_are_the_published_formulas():
    h = torch.randn(50, 5, dtype=torch.float64)
    down = torch.randn(3, 5, dtype=torch.float64)
    expected = {
        "wifv": h.var(0, unbiased=False) * (down**2).sum(0),
        "wanda": (down**2).sum(0).sqrt() * (h**2).mean(0).sqrt(),
        "magnitude": (down**2).sum(0).sqrt(),
    }
    assert expected.keys() == SCORES.keys()
    for name, value in expected.items():
        torch.testing.assert_close(SCORES[name]()(stats_of(h), down), value)


def test_masks_prune_like_zeroed_columns_and_come_off(dense):
    tokens = windows(1)
    plain = text_loss(dense.model, tokens)
    kept = torch.stack([torch.arange(0, 64, 2)] * 2)
    with pruned(dense, keep_mask(kept, 64)):
        masked = text_loss(dense.model, tokens)
    assert text_loss(dense.model, tokens) == plain
    with torch.no_grad():
        for down in dense.downs:
            down.weight[:, 1::2] = 0
    assert masked == pytest.approx(text_loss(dense.model, tokens), abs=1e-6)
    assert masked != pytest.approx(plain, abs=1e-6)


def test_perplexity_affinity_normalises_columns_and_correlates_rows(dense):
    tokens = {name: windows(i) for i, name in enumerate("abc")}
    scores = [score_layers(WIFV(), calibrate(dense, t), dense) for t in tokens.values()]
    found = perplexity_affinity(dense, list(tokens), scores, list(tokens.values()), 8, silent)
    p = found.perplexity_MM.numpy()
    with pruned(dense, keep_mask(top_channels(scores[2], 8), 64)):
        assert p[2, 1] == pytest.approx(perplexity(text_loss(dense.model, tokens["b"])))
    np.testing.assert_allclose(found.correlation_MM.numpy(), np.corrcoef(p.min(0) / p), atol=1e-9)


def test_score_affinity_sees_which_domains_prune_alike():
    base = torch.rand(2, 40, dtype=torch.float64) + 0.1
    near = base * (1 + 0.01 * torch.rand(2, 40, dtype=torch.float64))
    far = torch.rand(2, 40, dtype=torch.float64) + 0.1
    correlation = score_affinity("abc", [base, near, far]).correlation_MM
    assert correlation[0, 1] > 0.99
    assert correlation[0, 2] < 0.7


def test_clusters_follow_the_correlation_and_are_exactly_as_many_as_experts():
    correlation = torch.eye(5, dtype=torch.float64)
    for i, j in ((0, 3), (1, 4)):
        correlation[i, j] = correlation[j, i] = 0.9
    affinity = DomainAffinity(tuple("abcde"), correlation)
    assert cluster(affinity, 3, "average").groups == (("a", "d"), ("b", "e"), ("c",))
    same = DomainAffinity(tuple("abcde"), torch.ones(5, 5, dtype=torch.float64))
    for experts in range(1, 6):
        groups = cluster(same, experts, "average").groups
        assert len(groups) == experts
        assert sorted(d for group in groups for d in group) == list("abcde")
    with pytest.raises(PomonaError, match=r"5 domains .* cannot make 6 experts"):
        cluster(affinity, 6, "average")


def test_plan_keeps_the_best_channels_of_the_pooled_group(dense):
    stats = {name: calibrate(dense, windows(i)) for i, name in enumerate("abc")}
    plan = plan_experts(dense, stats, [("a", "c"), ("b",)], WIFV(), 16)
    assert plan.keep_LEW.shape == (2, 2, 16)
    assert (plan.keep_LEW.diff(dim=-1) > 0).all()
    again = ExpertPlan.from_json(json.loads(json.dumps(plan.to_json())))
    assert torch.equal(again.keep_LEW, plan.keep_LEW)
    assert (again.groups, again.channels) == (plan.groups, plan.channels)
    together = score_layers(WIFV(), calibrate(dense, torch.cat([windows(0), windows(2)])), dense)
    assert set(plan.keep_LEW[1, 0].tolist()) == set(together[1].topk(16).indices.tolist())


def test_ridge_is_the_least_squares_solution_and_beats_doing_nothing(dense):
    tokens = windows(3, 30)
    keep = torch.stack([torch.arange(20)] * 2)
    _, h, y = seen(dense, tokens)[1]
    h, y = h.double(), y.double()
    refit = Ridge(1e-9)(dense, tokens, keep)[1]
    solution = torch.linalg.lstsq(h[:, :20], y).solution.T
    torch.testing.assert_close(refit, solution, rtol=1e-2, atol=1e-4)

    def error(down):
        return float((h[:, :20] @ down.T - y).square().sum())

    assert error(Ridge()(dense, tokens, keep)[1]) < error(NoCompensation()(dense, tokens, keep)[1])


def test_second_moments_are_sums_of_outer_products(dense):
    tokens = windows(4, 20)
    _, h, _ = seen(dense, tokens)[0]
    expected = h.double().T @ h.double()
    scale = float(expected.abs().max())
    torch.testing.assert_close(
        second_moments(dense, tokens)[0] / scale, expected / scale, rtol=0, atol=1e-6
    )


def test_expert_errors_against_the_experts_written_out(dense):
    x, h, y = seen(dense, windows(5))[0]
    keep = torch.stack([torch.arange(0, 20), torch.arange(30, 50)])
    ffn = dense.ffns[0]
    downs = [ffn.down_proj.weight.detach()[:, k] for k in keep]
    errors = expert_errors(h, y, keep, downs)
    for e, k in enumerate(keep):
        inner = torch.nn.functional.silu(x @ ffn.gate_proj.weight[k].T) * (
            x @ ffn.up_proj.weight[k].T
        )
        expected = (inner @ downs[e].T - y).square().sum(1)
        torch.testing.assert_close(errors[:, e], expected, rtol=1e-4, atol=1e-6)


def test_fitted_router_learns_a_separable_choice():
    x = torch.randn(600, 8, generator=torch.Generator().manual_seed(0))
    truth = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    best = (x @ truth.T).argmax(1)
    rows = Fitted().fit(x, best, 3)
    assert ((x @ rows.T).argmax(1) == best).float().mean() > 0.97


@pytest.mark.parametrize("kind", ROUTERS)
def test_every_router_gives_finite_rows_of_the_right_shape(dense, kind):
    keep = torch.stack([torch.stack([torch.arange(16), torch.arange(16, 32)])] * 2)
    downs = [[d.weight.detach()[:, k] for k in keep[i]] for i, d in enumerate(dense.downs)]
    rows = ROUTERS[kind]()(dense, [windows(0), windows(1)], keep, downs, 0)
    assert [tuple(r.shape) for r in rows] == [(2, 32), (2, 32)]
    assert all(r.isfinite().all() and not torch.equal(r[0], r[1]) for r in rows)
