"""The rooms of reconstruction, each against a plain computation."""

import json
from typing import get_args

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from pomona.errors import PomonaError
from pomona.evaluation.loss import perplexity, text_loss
from pomona.models.dense import LLAMA
from pomona.models.experts import freeze
from pomona.models.weights import Checkpoint
from pomona.progress import silent
from pomona.reconstruction.affinity import (
    DomainAffinity,
    perplexity_affinity,
    rank_agreement,
    score_affinity,
)
from pomona.reconstruction.balance import balanced_clusters
from pomona.reconstruction.calibrate import calibrate, saliency, stats_of
from pomona.reconstruction.cluster import Linkage, cluster, random_groups, refine
from pomona.reconstruction.compensate import Bias, NoCompensation, Ridge, normal_equations
from pomona.reconstruction.ffn import (
    dense_model,
    keep_mask,
    masked,
    observe,
    pruned,
    top_channels,
)
from pomona.reconstruction.outputs import OutputMoments, output_moments
from pomona.reconstruction.plan import ExpertPlan
from pomona.reconstruction.planners import Calibration, TopChannels
from pomona.reconstruction.planners.top_channels import common_channels
from pomona.reconstruction.router import Fitted
from pomona.reconstruction.scores import SCORES, WIFV, score_layers


@pytest.fixture
def dense(dense_dir):
    model = AutoModelForCausalLM.from_pretrained(dense_dir)
    freeze(model)
    return dense_model(model, LLAMA, Checkpoint.open(dense_dir))


LAYERS = range(2)


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
    assert expected.keys() | {"taylor", "random"} == SCORES.keys()
    for name, value in expected.items():
        torch.testing.assert_close(SCORES[name]()(stats_of(h), down), value)


def test_pruned_is_masked_is_zeroed_columns_and_the_weights_come_back(dense):
    tokens = windows(1)
    plain = text_loss(dense.model, tokens)
    before = {name: (value, value.clone()) for name, value in dense.model.named_parameters()}
    kept = torch.stack([torch.arange(0, 64, 2), torch.arange(32)])
    with pruned(dense, kept):
        assert {down.weight.shape[1] for down in dense.downs} == {32}
        sliced = text_loss(dense.model, tokens)
    with masked(dense, keep_mask(kept, 64)):
        assert sliced == pytest.approx(text_loss(dense.model, tokens), abs=1e-6)
    after = dict(dense.model.named_parameters())
    assert list(after) == list(before)
    for name, (value, copy) in before.items():
        assert after[name] is value
        assert torch.equal(value, copy)
    with pytest.raises(KeyError), pruned(dense, kept):
        raise KeyError
    assert text_loss(dense.model, tokens) == plain
    with torch.no_grad():
        dense.downs[0].weight[:, 1::2] = 0
        dense.downs[1].weight[:, 32:] = 0
    assert sliced == pytest.approx(text_loss(dense.model, tokens), abs=1e-6)
    assert sliced != pytest.approx(plain, abs=1e-6)


def test_perplexity_affinity_normalises_columns_and_correlates_rows(dense):
    tokens = {name: windows(i) for i, name in enumerate("abc")}
    scores = [score_layers(WIFV(), calibrate(dense, t), dense) for t in tokens.values()]
    found = perplexity_affinity(
        dense, list(tokens), scores, list(tokens.values()), 8, "rows", silent
    )
    p = found.perplexity_MM.numpy()
    with masked(dense, keep_mask(top_channels(scores[2], 8), 64)):
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
    for linkage in get_args(Linkage):
        assert cluster(affinity, 3, linkage).groups == (("a", "d"), ("b", "e"), ("c",))


def test_random_groups_deal_every_domain_once():
    groups = random_groups("abcdefgh", 3, seed=1)
    assert sorted(map(len, groups)) == [2, 3, 3]
    assert sorted(d for group in groups for d in group) == list("abcdefgh")
    assert groups == random_groups("abcdefgh", 3, seed=1) != random_groups("abcdefgh", 3, seed=2)


def test_balanced_clusters_find_the_groups_that_are_there():
    generator = np.random.default_rng(0)
    centres = np.array([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]])
    truth = np.repeat([0, 1, 2], 7)
    points = centres[truth] + generator.normal(size=(21, 2))
    order = generator.permutation(21)
    label = balanced_clusters(points[order], 3, 7)
    assert np.bincount(label).tolist() == [7, 7, 7]
    assert all(len(set(label[truth[order] == group])) == 1 for group in range(3))
    with pytest.raises(PomonaError, match="21 points are not 4 clusters of 5"):
        balanced_clusters(points, 4, 5)


def test_few_domains_are_split_by_what_their_windows_look_like():
    """Windows of two kinds in one corpus: each part holds one kind; a small domain stays whole."""
    kinds = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1])
    corpus = kinds.unsqueeze(1).expand(8, 5) * 10
    split = refine({"corpus": corpus, "small": torch.ones(2, 5)}, lambda own: own.float(), 3)
    assert list(split) == ["corpus 1", "corpus 2", "small"]
    assert {len(set(part.flatten().tolist())) for part in split.values()} == {1}
    assert sum(map(len, split.values())) == 10
    with pytest.raises(PomonaError, match='domain "small" has 2 windows'):
        refine({"small": torch.ones(2, 5)}, lambda own: own.float(), 3)


def test_agreement_is_spearmans():
    a = torch.tensor([[1.0, 0.9, 0.1], [0.9, 1.0, 0.5], [0.1, 0.5, 1.0]])
    assert rank_agreement(a, a.square()) == pytest.approx(1)
    assert rank_agreement(a, -a) == pytest.approx(-1)
    assert rank_agreement(a, torch.ones(3, 3)) is None
    assert rank_agreement(a[:2, :2], a[:2, :2]) is None


def test_saliency_is_what_autograd_says(dense):
    """One window: Σ_t |h · ∂(Σ nats)/∂h| with the last layer's activations as leaves."""
    tokens = windows(6)[:1]
    found = {}

    def replace(_module, args):
        found["h"] = args[0].detach().requires_grad_()
        return (found["h"],)

    handle = dense.downs[-1].register_forward_pre_hook(replace)
    logits = dense.model(input_ids=tokens, use_cache=False).logits[0, :-1]
    handle.remove()
    torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum").backward()
    expected = (found["h"] * found["h"].grad).abs()[0].sum(0).double()
    torch.testing.assert_close(saliency(dense, tokens)[-1], expected.detach(), rtol=1e-4, atol=1e-7)
    assert all(parameter.grad is None for parameter in dense.model.parameters())


def test_plan_keeps_the_best_channels_of_the_pooled_group(dense):
    given = {name: windows(i) for i, name in enumerate("abc")}
    stats = {name: calibrate(dense, own) for name, own in given.items()}
    calibration = Calibration(dense, given, stats)
    plan = TopChannels()(calibration, [("a", "c"), ("b",)], WIFV(), 16, 1, 0)
    assert plan.keep_LEW.shape == (2, 2, 16)
    assert (plan.keep_LEW.diff(dim=-1) > 0).all()
    again = ExpertPlan.from_json(json.loads(json.dumps(plan.to_json())))
    assert torch.equal(again.keep_LEW, plan.keep_LEW)
    assert (again.groups, again.channels) == (plan.groups, plan.channels)
    together = score_layers(WIFV(), calibrate(dense, torch.cat([windows(0), windows(2)])), dense)
    assert set(plan.keep_LEW[1, 0].tolist()) == set(together[1].topk(16).indices.tolist())


def test_shared_channels_are_those_that_most_experts_would_keep():
    score = torch.tensor([[[9.0, 8, 7, 1, 2, 3]], [[9.0, 1, 8, 7, 2, 3]]])
    assert common_channels(score, 1, 2).tolist() == [[0]]
    assert common_channels(score, 2, 1).tolist() == [[0, 2]]


def plan_of(dense, keep, shared=()):
    """A plan with the same channels in every layer; one list of kept channels per expert."""
    layers = len(dense.ffns)
    return ExpertPlan(
        torch.tensor([keep] * layers),
        tuple((str(e),) for e in range(len(keep))),
        dense.channels,
        torch.tensor([list(shared)] * layers, dtype=torch.int64),
    )


@pytest.mark.parametrize("shared", [(), (40, 41, 42)])
def test_ridge_is_the_least_squares_solution_and_beats_doing_nothing(dense, shared):
    tokens = windows(3, 30)
    plan = plan_of(dense, [list(range(20))], shared)
    _, h, y = seen(dense, tokens)[1]
    h, y = h.double(), y.double()
    if shared:
        down = dense.downs[1].weight.detach().double()
        y = y - h[:, list(shared)] @ down[:, list(shared)].T
    refit = Ridge(1e-9)(dense, tokens, plan, 0, LAYERS)[1].column_DW
    solution = torch.linalg.lstsq(h[:, :20], y).solution.T
    torch.testing.assert_close(refit.double(), solution, rtol=1e-2, atol=1e-4)

    def error(compensation):
        column = compensation(dense, tokens, plan, 0, LAYERS)[1].column_DW.double()
        return float((h[:, :20] @ column.T - y).square().sum())

    assert error(Ridge()) < error(NoCompensation())


def test_bias_is_the_mean_output_of_what_is_gone(dense):
    tokens = windows(3, 30)
    plan = plan_of(dense, [list(range(20))])
    _, h, _ = seen(dense, tokens)[0]
    expected = (h[:, 20:] @ dense.downs[0].weight.detach()[:, 20:].T).mean(0)
    bias = Bias()(dense, tokens, plan, 0, LAYERS)[0].bias_D
    torch.testing.assert_close(bias.float(), expected, rtol=1e-4, atol=1e-5)


def test_normal_equations_are_sums_of_outer_products(dense):
    tokens = windows(4, 20)
    _, h, _ = seen(dense, tokens)[0]
    h = h.double()
    plan = plan_of(dense, [list(range(20))], [30])
    gram, target = normal_equations(dense, tokens, plan, 0, LAYERS)[0]
    kept = h[:, :20]
    gone = [f for f in range(dense.channels) if f >= 20 and f != 30]
    pruned = h[:, gone] @ dense.downs[0].weight.detach().double()[:, gone].T
    for found, expected in ((gram, kept.T @ kept), (target, pruned.T @ kept)):
        scale = float(expected.abs().max())
        torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=1e-6)


def test_moments_give_the_error_of_any_routing(dense):
    plan = plan_of(dense, [list(range(20)), list(range(30, 50))], [60, 61])
    x, h, y = seen(dense, windows(5))[0]
    ffn = dense.ffns[0]
    down = ffn.down_proj.weight.detach()
    moments = output_moments(dense, plan, 0, [down[:, k] for k in plan.keep_LEW[0]], x)
    outputs = []
    for k in plan.keep_LEW[0]:
        inner = torch.nn.functional.silu(x @ ffn.gate_proj.weight[k].T) * (
            x @ ffn.up_proj.weight[k].T
        )
        outputs.append(inner @ down[:, k].T)
    target = y - h[:, 60:62] @ down[:, 60:62].T
    weight = torch.rand(len(x), 2, generator=torch.Generator().manual_seed(0))
    mixed = sum(w.unsqueeze(1) * o for w, o in zip(weight.T, outputs, strict=True))
    expected = (mixed - target).square().sum() - target.square().sum()
    torch.testing.assert_close(moments.error(weight), expected, rtol=1e-4, atol=1e-5)
    errors = torch.stack([(o - target).square().sum(1) for o in outputs], 1)
    assert torch.equal(moments.best(1).argmax(1), errors.argmin(1))
    assert torch.equal(moments.best(2), torch.full((len(x), 2), 0.5))


def test_the_best_pair_is_found_where_two_halves_make_the_target():
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn(50, 4, 16, generator=generator)
    target = (parts[:, 1] + parts[:, 3]) / 2
    moments = OutputMoments(parts @ parts.mT, (parts @ target.unsqueeze(2)).squeeze(2))
    assert torch.equal(moments.best(2), torch.tensor([0, 0.5, 0, 0.5]).expand(50, 4))


def test_fitted_router_learns_a_separable_choice():
    x = torch.randn(600, 8, generator=torch.Generator().manual_seed(0))
    truth = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    best = (x @ truth.T).argmax(1)
    rows = Fitted().regress(x, torch.nn.functional.one_hot(best, 3).float())
    assert ((x @ rows.T).argmax(1) == best).float().mean() > 0.97
