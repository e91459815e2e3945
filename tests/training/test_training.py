"""The loop: one stacked optimiser equals separate ones, each client clipped for itself."""

import pytest
import torch

from pomona.errors import PomonaError
from pomona.training.loop import AdamW, clip_per_client, fit
from pomona.training.loss import client_means
from pomona.training.schedule import cosine

TARGET = torch.tensor([[1.0, 2.0], [300.0, -4.0], [0.1, 0.2]])


def losses_of(weight, target):
    return lambda step: (weight - target).square().sum(1) * (step + 1)


@pytest.mark.parametrize("optimiser", [AdamW(), AdamW(clip=0, weight_decay=0.1), AdamW(clip=0.01)])
def test_stacked_adamw_equals_torchs_own_per_client(optimiser):
    stacked = torch.zeros(3, 2, requires_grad=True)
    history = fit([stacked], losses_of(stacked, TARGET), 5, lambda s: 0.1 / (s + 1), optimiser)
    assert history.shape == (5, 3)
    for client in range(3):
        alone = torch.zeros(1, 2, requires_grad=True)
        engine = torch.optim.AdamW([alone], lr=0.1, weight_decay=optimiser.weight_decay)
        loss = losses_of(alone, TARGET[client : client + 1])
        for step in range(5):
            engine.param_groups[0]["lr"] = 0.1 / (step + 1)
            engine.zero_grad()
            loss(step).sum().backward()
            if optimiser.clip:
                torch.nn.utils.clip_grad_norm_([alone], optimiser.clip)
            engine.step()
        torch.testing.assert_close(stacked[client].detach(), alone[0].detach())


def test_every_client_at_its_own_learning_rate():
    """Factors of a cohort's rate, against torch's own AdamW at that rate for each client."""
    optimiser, factors = AdamW(weight_decay=0.1), [1.0, 0.25, 3.0]
    stacked = torch.ones(3, 2, requires_grad=True)
    fit([stacked], losses_of(stacked, TARGET), 5, lambda _: 0.1, optimiser, factors=factors)
    for client, factor in enumerate(factors):
        alone = torch.ones(1, 2, requires_grad=True)
        loss = losses_of(alone, TARGET[client : client + 1])
        fit([alone], loss, 5, lambda _, own=0.1 * factor: own, optimiser)
        torch.testing.assert_close(stacked[client].detach(), alone[0].detach())
    plain, ones = torch.ones(3, 2, requires_grad=True), torch.ones(3, 2, requires_grad=True)
    fit([plain], losses_of(plain, TARGET), 5, lambda _: 0.1, optimiser)
    fit([ones], losses_of(ones, TARGET), 5, lambda _: 0.1, optimiser, factors=[1.0] * 3)
    assert torch.equal(plain, ones)


def test_one_clients_huge_gradient_leaves_the_others_alone():
    a, b = torch.ones(2, 3), torch.ones(2, 2, 2)
    a.grad = torch.stack([torch.full((3,), 1e6), torch.full((3,), 0.1)])
    b.grad = torch.zeros(2, 2, 2)
    clip_per_client([a, b], 1.0)
    assert a.grad[0].norm() == pytest.approx(1.0, abs=1e-4)
    assert torch.equal(a.grad[1], torch.full((3,), 0.1))


def test_a_loss_that_is_not_finite_is_named():
    weight = torch.zeros(3, 1, requires_grad=True)

    def losses(step):
        return (weight * torch.tensor([[1.0], [float("nan") if step else 1.0], [1.0]])).sum(1)

    with pytest.raises(PomonaError, match="client 1 of the cohort diverged at step 1"):
        fit([weight], losses, 3, lambda _: 0.1, AdamW())


def test_client_means_and_a_client_without_tokens():
    means = client_means(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 2]), 4)
    assert means.tolist() == [2.0, 0.0, 5.0, 0.0]


def test_cosine_runs_from_start_to_end():
    rates = [cosine(1.0, 0.1, done, 5) for done in range(5)]
    assert rates[0] == 1.0
    assert rates[-1] == pytest.approx(0.1)
    assert rates[2] == pytest.approx(0.55)
    assert rates == sorted(rates, reverse=True)
    assert cosine(0.3, 0.1, 0, 1) == 0.3
