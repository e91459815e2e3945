"""Specialisation: each of its steps against the formula written out, and what the rounds are worth."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from pomona.errors import PomonaError
from pomona.models.dense.llama import LLAMA
from pomona.models.experts import freeze
from pomona.models.weights import Checkpoint
from pomona.reconstruction.compensate import NoCompensation, Refit, Ridge
from pomona.reconstruction.ffn import dense_model, sample_inputs
from pomona.reconstruction.outputs import output_moments, routed_targets
from pomona.reconstruction.plan import ExpertPlan
from pomona.reconstruction.router import Centroids, Fitted, routing_weights
from pomona.reconstruction.settings import ReconstructSettings
from pomona.reconstruction.specialise import (
    LayerExperts,
    Specialise,
    deal_channels,
    dense_share,
    joint_columns,
    shared_energy,
)

EXPERTS, WIDTH, SHARED = 4, 10, (60, 61)


@pytest.fixture(scope="module")
def dense(dense_dir):
    model = AutoModelForCausalLM.from_pretrained(dense_dir)
    freeze(model)
    return dense_model(model, LLAMA, Checkpoint.open(dense_dir))


@pytest.fixture(scope="module")
def x(dense):
    tokens = torch.randint(3, 300, (60, 24), generator=torch.Generator().manual_seed(0))
    return sample_inputs(dense, [tokens], 1440, range(1, 2))[0]


def plan_of(dense, active: int) -> ExpertPlan:
    generator = torch.Generator().manual_seed(1)
    keep = [torch.randperm(60, generator=generator)[:WIDTH].sort().values for _ in range(EXPERTS)]
    layers = len(dense.ffns)
    return ExpertPlan(
        torch.stack(keep).expand(layers, -1, -1),
        tuple((str(e),) for e in range(EXPERTS)),
        dense.channels,
        torch.tensor([SHARED] * layers),
        active=active,
    )


def weights_of(x, active: int):
    rows = torch.randn(EXPERTS, x.shape[1], generator=torch.Generator().manual_seed(2)) * 0.3
    return routing_weights(x @ rows.T, active)


def whole(dense, plan, x):
    """The activations and targets of all tokens at once."""
    _, activations, targets = zip(*routed_targets(dense, plan, 1, x), strict=True)
    return torch.cat(activations).double(), torch.cat(targets).double()


def error(dense, plan, x, made: LayerExperts) -> float:
    own = replace(plan, keep_LEW=plan.keep_LEW.clone())
    own.keep_LEW[1] = made.keep_EW
    moments = output_moments(dense, own, 1, [refit.column_DW for refit in made.refits], x)
    return float(moments.error(routing_weights(x @ made.router_ED.T, plan.active)))


@pytest.mark.parametrize("active", [1, 2, 3])
def test_routing_weights_are_the_softmax_over_the_chosen(x, active):
    rows = torch.randn(EXPERTS, x.shape[1], generator=torch.Generator().manual_seed(2)) * 0.3
    weights = routing_weights(x @ rows.T, active)
    for score, weight in zip((x @ rows.T)[:20], weights[:20], strict=True):
        best = score.topk(active).indices
        torch.testing.assert_close(weight[best], score[best].softmax(0))
        assert weight.count_nonzero() == active


@pytest.mark.parametrize("active", [1, 2, 3])
def test_columns_minimise_the_joint_error(dense, x, active):
    """Many sweeps and next to no penalty: the least squares solution for all experts at once."""
    plan, weights = plan_of(dense, active), weights_of(x, active)
    h, target = whole(dense, plan, x)
    columns = joint_columns(dense, plan, 1, x, weights, Ridge(1e-9), 400)
    parts = [
        h[:, k] * w.double().unsqueeze(1) for k, w in zip(plan.keep_LEW[1], weights.T, strict=True)
    ]
    inputs = torch.cat(parts, dim=1)
    solution = torch.linalg.lstsq(inputs, target).solution
    best = (inputs @ solution - target).square().sum()
    found = (inputs @ torch.cat(columns, dim=1).T.double() - target).square().sum()
    assert best <= found <= best * 1.0001


@pytest.mark.parametrize("active", [1, 2])
def test_energy_is_summed_over_the_tokens_two_experts_serve(dense, x, active):
    plan, serves = plan_of(dense, active), weights_of(x, active) > 0
    h, _ = whole(dense, plan, x)
    energy = h.square() * dense.down_DF(1).double().square().sum(0)
    found = shared_energy(dense, 1, x, serves)
    for e in range(EXPERTS):
        for p in range(EXPERTS):
            expected = energy[serves[:, e] & serves[:, p]].sum(0)
            torch.testing.assert_close(found[e, p], expected, rtol=1e-4, atol=1e-8)


def test_partners_do_not_keep_the_same_channel_for_the_same_tokens():
    """Two experts that always serve together divide the best channels; alone both take them."""
    best = torch.tensor([9.0, 8, 7, 6, 1, 1], dtype=torch.float64)
    keep = torch.tensor([[4, 5], [4, 5]])
    nothing = torch.zeros(0, dtype=torch.int64)
    together = deal_channels(best.expand(2, 2, 6).clone(), keep, nothing)
    assert together.tolist() == [[0, 1], [2, 3]]
    apart = torch.diag_embed(torch.ones(2, dtype=torch.float64)).unsqueeze(2) * best
    assert deal_channels(apart, keep, nothing).tolist() == [[0, 1], [0, 1]]
    assert deal_channels(apart, keep, torch.tensor([0])).tolist() == [[1, 2], [1, 2]]
    assert deal_channels(torch.zeros_like(apart), keep, nothing).tolist() == keep.tolist()


def test_the_share_of_a_dense_column_counts_who_else_gives_it():
    serves = torch.tensor([[True, True, False]] * 3 + [[True, False, True]])
    share = dense_share(torch.tensor([[0, 1], [1, 2], [0, 3]]), serves, 4)
    assert share[0, :2].tolist() == [2 / 1.25, 2 / 1.75]
    assert share[1, 1] == 1
    assert share[2, 3] == 2
    never = torch.tensor([[True, True, False]] * 3)
    assert dense_share(torch.tensor([[0, 1]] * 3), never, 2).tolist() == [[1, 1]] * 3


@pytest.mark.parametrize("active", [1, 2])
def test_every_round_is_worth_it(dense, x, active):
    plan, ridge, router = plan_of(dense, active), Ridge(), Fitted()
    refits = [Refit(dense.down_DF(1)[:, keep]) for keep in plan.keep_LEW[1]]
    columns = [refit.column_DW for refit in refits]
    rows = router.fit(x, output_moments(dense, plan, 1, columns, x), active)
    start = LayerExperts(plan.keep_LEW[1], refits, rows)
    made = [Specialise(rounds)(dense, plan, 1, x, start, ridge, router) for rounds in range(4)]
    errors = [error(dense, plan, x, own) for own in made]
    assert errors[0] == error(dense, plan, x, start)
    assert errors[1] < errors[0]
    assert errors[3] < errors[1]
    for own in made:
        assert own.keep_EW.shape == (EXPERTS, WIDTH)
        assert (own.keep_EW.diff(dim=1) > 0).all()
        assert not set(SHARED) & set(own.keep_EW.flatten().tolist())


def test_another_compensation_or_router_must_say_so():
    for change in ({"compensation": NoCompensation()}, {"router": Centroids()}):
        with pytest.raises(PomonaError, match="set specialise"):
            ReconstructSettings(**change)
        assert ReconstructSettings(**change, specialise=Specialise(rounds=0))
    for change in ({"rounds": -1}, {"tokens": 0}, {"sweeps": 0}):
        with pytest.raises(PomonaError):
            Specialise(**change)
