"""Every selection rule against a brute-force twin on materialised activations."""

import itertools

import numpy as np
import pytest
import torch
from families import FAMILIES
from laws.test_federation_laws import base_of, examples

from pomona.data.examples import Example, collate
from pomona.errors import PomonaError
from pomona.federation.graft import Graft, choose_experts
from pomona.federation.selection import (
    SELECTIONS,
    Gradient,
    Greedy,
    RandomExpert,
    Reconstruction,
    SameExpert,
    Usage,
)
from pomona.federation.selection import greedy as greedy_module
from pomona.federation.selection import passes as passes_module
from pomona.federation.selection.greedy import forward_selection
from pomona.federation.update import ClientState, stack
from pomona.seeds import seed_of
from pomona.training.loss import completion_losses

SOME = ["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss"]


def batches_of(client=3, rows=6, size=4):
    own = examples(client, 6)[:rows]
    return [collate(own[i : i + size], 0) for i in range(0, rows, size)]


def alone(rule, base, batches, seed, count):
    """Return what a rule gives a client without others."""
    (chosen,) = rule(base.model, base.sites, [batches], [seed], count)
    return chosen


def calls(base, batches):
    """Per site what the experts saw and gave over all real tokens: x, index, weight, output."""
    seen = [[] for _ in base.sites]
    for batch in batches:
        mask = batch.attention_mask_BT.bool().flatten()

        def hook(_module, args, output, place, mask=mask):
            seen[place].append([value[mask] for value in (*args, output)])

        handles = [
            site.experts.register_forward_hook(lambda m, a, o, p=p: hook(m, a, o, p))
            for p, site in enumerate(base.sites)
        ]
        with torch.no_grad():
            base.model(input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT)
        for handle in handles:
            handle.remove()
    return [[torch.cat(column) for column in zip(*own, strict=True)] for own in seen]


@pytest.mark.parametrize("family", SOME)
def test_reconstruction_finds_the_expert_that_alone_makes_the_output(family):
    """When every token is routed to one expert with weight one, its loss is zero."""
    base = base_of(family)
    target = 2
    handles = [
        site.experts.register_forward_pre_hook(
            lambda m, a: (a[0], torch.full_like(a[1][:, :1], target), torch.ones_like(a[2][:, :1]))
        )
        for site in base.sites
    ]
    batches = [collate([Example(tuple(range(5, 20)), 3)], 0)]
    losses = Reconstruction().losses(base.model, base.sites, [batches])[0]
    for handle in handles:
        handle.remove()
    for loss_E in losses:
        assert int(loss_E.argmin()) == target
        assert float(loss_E[target]) < 1e-4 * float(loss_E.max())


@pytest.mark.parametrize("family", SOME)
def test_reconstruction_is_the_sum_of_the_batches_distances(family):
    base, batches = base_of(family), batches_of()
    losses = Reconstruction().losses(base.model, base.sites, [batches])[0]
    apart = []
    for batch in batches:
        for site, (x, _, _, output) in zip(base.sites, calls(base, [batch]), strict=True):
            apart.append([float((output - site.apply(x, e)).norm()) for e in range(4)])
    expected = torch.tensor(apart).view(len(batches), len(base.sites), 4).sum(0)
    torch.testing.assert_close(torch.stack(losses).float(), expected, rtol=1e-5, atol=1e-5)
    chosen = alone(Reconstruction(), base, batches, 0, 2)
    assert chosen == expected.argsort(dim=1)[:, :2].tolist()


@pytest.mark.parametrize("family", SOME)
def test_greedy_is_lstsq_over_materialised_outputs(family, monkeypatch):
    """Every step tries every expert with numpy's least squares on all outputs [N·D, k] at once."""
    monkeypatch.setattr(greedy_module, "_BLOCK", 4 * 32 * 7)  # seven tokens at a time
    base, batches = base_of(family), batches_of()
    moments = Greedy().moments(base.model, base.sites, [batches])[0]
    chosen = alone(Greedy(), base, batches, 0, 3)
    assert len(chosen) == len(moments) == len(base.sites)
    for site, own, sums, (x, _, _, output) in zip(
        base.sites, chosen, moments, calls(base, batches), strict=True
    ):
        outputs = [site.apply(x, e).flatten().double().numpy() for e in range(site.num_experts)]
        target = output.flatten().double().numpy()

        def error(experts, outputs=outputs, target=target):
            design = np.stack([outputs[e] for e in experts], axis=1)
            weights = np.linalg.lstsq(design, target, rcond=None)[0]
            return float(np.square(target - design @ weights).sum()), weights

        expected = []
        for _ in range(3):
            left = [e for e in range(site.num_experts) if e not in expected]
            expected.append(min(left, key=lambda e: error([*expected, e])[0]))
        assert own == expected
        picked, weights = forward_selection(sums, 3)
        assert picked == expected
        residual, by_numpy = error(expected)
        np.testing.assert_allclose(weights.numpy(), by_numpy, rtol=1e-6, atol=1e-8)
        left_over = float(sums.square - weights @ sums.cross_E[picked])
        np.testing.assert_allclose(left_over, residual, rtol=1e-6)


def test_greedy_finds_the_experts_that_make_the_output_and_their_weights():
    """Three experts of every token with fixed weights: those, nothing left, and the best pair first."""
    base = base_of("mixtral")
    index, weight = torch.tensor([3, 0, 2]), torch.tensor([0.9, -0.5, 0.2])
    handles = [
        site.experts.register_forward_pre_hook(
            lambda m, a: (a[0], index.expand(len(a[0]), 3), weight.expand(len(a[0]), 3))
        )
        for site in base.sites
    ]
    moments = Greedy().moments(base.model, base.sites, [batches_of()])[0]
    for handle in handles:
        handle.remove()
    for sums in moments:
        chosen, found = forward_selection(sums, 3)
        if set(chosen) == {0, 2, 3}:  # forward selection may begin with one that it does not need
            for expert, value in zip(chosen, found.tolist(), strict=True):
                assert value == pytest.approx(float(weight[index == expert]), abs=1e-4)
        everything, all_found = forward_selection(sums, 4)
        assert sorted(everything) == [0, 1, 2, 3]
        wanted = dict(zip(index.tolist(), weight.tolist(), strict=True)) | {1: 0.0}
        for expert, value in zip(everything, all_found.tolist(), strict=True):
            assert value == pytest.approx(wanted[expert], abs=1e-4)


def test_greedy_with_two_experts_alike_does_not_divide_by_zero():
    base = base_of("mixtral")
    with torch.no_grad():
        for parameter in base.sites[0].experts.parameters():
            parameter[1] = parameter[0]
    moments = Greedy().moments(base.model, base.sites, [batches_of()])[0][0]
    chosen, weights = forward_selection(moments, 4)
    assert sorted(chosen) == [0, 1, 2, 3]
    assert weights.isfinite().all()
    assert weights.abs().max() < 1e3


@pytest.mark.parametrize("family", SOME)
def test_usage_is_frequency_times_weight_times_norm(family):
    base, batches = base_of(family), batches_of()
    usage = Usage().usage(base.model, base.sites, [batches])[0]
    for site, usage_E, (x, index, weight, _) in zip(
        base.sites, usage, calls(base, batches), strict=True
    ):
        expected = [0.0] * site.num_experts
        for n, k in itertools.product(range(len(x)), range(index.shape[1])):
            norm = site.apply(x[n : n + 1], int(index[n, k])).norm()
            expected[int(index[n, k])] += float(weight[n, k] * norm)
        torch.testing.assert_close(usage_E, torch.tensor(expected).double(), rtol=1e-4, atol=1e-4)
    assert alone(Usage(), base, batches, 0, 2) == [
        sorted(range(len(own)), key=lambda e: -own[e])[:2]
        for own in map(torch.Tensor.tolist, usage)
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_utility_is_autograd_s_on_the_experts_own_weights(family):
    """Both halves of gate_up_proj have D inputs, down_proj has W: their squared gradients by batch."""
    base, batches = base_of(family), batches_of(rows=5)
    utilities = Gradient().utilities(base.model, base.sites, [batches])[0]
    assert not any(p.grad is not None or p.requires_grad for p in base.model.parameters())
    expected = [torch.zeros(site.num_experts, dtype=torch.float64) for site in base.sites]
    for batch in batches:
        fused = [(s, s.experts.gate_up_proj, s.experts.down_proj) for s in base.sites]
        for _, *weights in fused:
            for weight in weights:
                weight.requires_grad_()
                weight.grad = None
        completion_losses(
            base.model, batch.input_ids_BT, batch.attention_mask_BT, batch.label_mask_BT, 1
        ).sum().backward()
        for (site, into, down), sum_E in zip(fused, expected, strict=True):
            for weight, size in ((into, site.hidden_size), (down, site.width)):
                sum_E += weight.grad.double().flatten(1).square().sum(1) / size
    for own, wanted in zip(utilities, expected, strict=True):
        assert wanted.max() > 0
        torch.testing.assert_close(own, wanted, rtol=1e-3, atol=1e-12)


def test_gradient_utility_is_what_a_newborn_graft_would_feel():
    """‖∂L/∂B‖² of grafts on every expert, over so many ranks that chance is small."""
    rank = 512
    base = base_of("mixtral", Graft(rank=rank, alpha=rank, gate="resident"))
    (batch,) = batches_of(rows=3)
    utilities = torch.stack(Gradient().utilities(base.model, base.sites, [[batch]])[0])
    felt = torch.zeros_like(utilities)
    for expert in range(4):
        graft = base.init_graft(0, "a", [[expert]] * len(base.sites))
        state = stack([ClientState(graft=graft)])
        factors = {n: v.requires_grad_() for n, v in state.graft.items() if n.endswith("lora_B")}
        with base.attach(state):
            completion_losses(
                base.model, batch.input_ids_BT, batch.attention_mask_BT, batch.label_mask_BT, 1
            ).sum().backward()
        for place, site in enumerate(base.sites):
            squares = [v.grad.square().sum() for n, v in factors.items() if site.name in n]
            assert len(squares) == 3
            felt[place, expert] = 3 / rank * torch.stack(squares).sum()
    torch.testing.assert_close(felt, utilities, rtol=0.2, atol=1e-12)


@pytest.mark.parametrize("kind", SELECTIONS)
def test_rows_cap_what_is_looked_at(kind):
    """The first three rows decide, however they are dealt into batches and whatever comes after."""
    rule = SELECTIONS[kind]
    if not hasattr(rule(), "rows"):
        assert rule in (RandomExpert, SameExpert)
        return
    base = base_of("qwen2_moe")
    few, many = batches_of(rows=3, size=3), batches_of(rows=6, size=4)
    chosen = alone(rule(), base, few, 0, 2)
    assert alone(rule(rows=3), base, many, 0, 2) == chosen
    with pytest.raises(PomonaError, match="selection rows 0 is not positive"):
        rule(rows=0)


@pytest.mark.parametrize("kind", ["losses", "moments", "usage", "utilities"])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_one_pass_serves_all_clients(family, kind, monkeypatch):
    """Clients of several sizes and lengths, some of them together in a pass, see what they see alone."""
    monkeypatch.setattr(passes_module, "_ROWS", 9)
    base = base_of(family)
    clients = [batches_of(3, 6, 4), batches_of(1, 1, 4), [], batches_of(2, 5, 2)]
    rules = {"losses": Reconstruction, "moments": Greedy, "usage": Usage, "utilities": Gradient}
    measure = getattr(rules[kind](rows=5), kind)
    calls = []
    base.model.register_forward_pre_hook(lambda *_: calls.append(1))
    together = measure(base.model, base.sites, clients)
    passes = len(calls)
    for own, batches in zip(together, clients, strict=True):
        (found,) = measure(base.model, base.sites, [batches])
        for ours, theirs in zip(own, found, strict=True):
            pairs = [(ours, theirs)]
            if kind == "moments":
                pairs = [(getattr(ours, n), getattr(theirs, n)) for n in ("gram_EE", "cross_E")]
            for one, other in pairs:
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)
                assert bool(other.any()) == bool(batches)
    assert (passes, len(calls) - passes) == (3, 6)


@pytest.mark.parametrize("kind", SELECTIONS)
def test_padding_is_not_looked_at(kind):
    base = base_of("mixtral")
    rows = [Example(tuple(range(5, 20)), 3)]
    padded = collate([*rows, Example(tuple(range(5, 45)), 3)], 0)
    short = collate(rows, 0)
    padded = type(padded)(
        padded.input_ids_BT[:1], padded.attention_mask_BT[:1], padded.label_mask_BT[:1]
    )
    assert padded.input_ids_BT.shape != short.input_ids_BT.shape
    chosen = [alone(SELECTIONS[kind](), base, [b], 0, 2) for b in (short, padded)]
    assert chosen[0] == chosen[1]


def test_random_differs_between_clients_and_same_does_not():
    base, batches = base_of("mixtral"), batches_of()
    seeds = [seed_of(0, "selection", f"client {i}") for i in range(40)]
    random, same = (
        rule(base.model, base.sites, [batches] * 40, seeds, 1)
        for rule in (RandomExpert(), SameExpert())
    )
    for site in range(len(base.sites)):
        assert {own[site][0] for own in random} == {0, 1, 2, 3}
    assert all(own == same[0] for own in same)
    draws = [alone(SameExpert(draw=d), base, batches, 0, 1) for d in range(40)]
    assert {own[0][0] for own in draws} == {0, 1, 2, 3}


def test_same_takes_the_expert_it_is_told_and_those_after_it():
    base, batches = base_of("mixtral"), batches_of()
    assert alone(SameExpert(3), base, batches, 5, 1) == [[3]] * len(base.sites)
    assert alone(SameExpert(3), base, batches, 5, 3) == [[3, 0, 1]] * len(base.sites)
    with pytest.raises(PomonaError, match=r"selection expert 4 is none of the 4 of .*at most 3"):
        alone(SameExpert(4), base, batches, 5, 1)
    with pytest.raises(PomonaError, match="selection expert -1 is negative"):
        SameExpert(-1)


class Stubborn:
    """A rule from outside that gives what it likes."""

    def __init__(self, own):
        self.own = own

    def __call__(self, model, sites, clients, seeds, count):
        return [[self.own for _ in sites] for _ in clients]


@pytest.mark.parametrize("own", [[0], [0, 0], [0, 4], [0, -1], [0, 1, 2]])
def test_a_rule_that_does_not_keep_its_promise_is_named(own):
    base = base_of("mixtral")
    graft = Graft(selection=Stubborn(own), count=2)
    with pytest.raises(PomonaError, match="Stubborn chose the experts"):
        choose_experts(base.model, base.sites, graft, [[]], [0])


def test_more_grafts_than_experts_are_refused():
    base = base_of("mixtral")
    with pytest.raises(PomonaError, match="graft count 5 is more than the 4 experts of model"):
        choose_experts(base.model, base.sites, Graft(count=5), [batches_of()], [0])
