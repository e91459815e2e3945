"""Frozen experts beside transformers' grouped products, in every family."""

import pytest
import torch
from families import FAMILIES, llama

from pomona.models.experts import find_expert_sites, freeze
from pomona.models.frozen_experts import use_frozen_experts

TOKENS = 37


def computed(site, x_ND, index_NK, weight_NK, pull_ND):
    """Return what a layer's experts give, and the gradients of tokens and routing weights."""
    leaves = [x_ND.clone().requires_grad_(), weight_NK.clone().requires_grad_()]
    found = site.experts(leaves[0], index_NK, leaves[1])
    return found, *torch.autograd.grad((found * pull_ND).sum(), leaves)


@pytest.mark.parametrize("copies", [1, 2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_they_give_what_their_twin_gives(family, copies):
    model = FAMILIES[family]()
    freeze(model)
    model.set_experts_implementation("grouped_mm")
    site = find_expert_sites(model)[0]
    generator = torch.Generator().manual_seed(copies)
    x_ND = torch.randn(TOKENS, site.hidden_size, generator=generator)
    chosen = [torch.randperm(site.num_experts, generator=generator) for _ in range(TOKENS)]
    index_NK = torch.stack(chosen)[:, :copies]
    weight_NK = torch.rand(TOKENS, copies, generator=generator)
    pull_ND = torch.randn(TOKENS, site.hidden_size, generator=generator)
    given = (x_ND, index_NK, weight_NK, pull_ND)
    expected = computed(site, *given)
    use_frozen_experts(model)
    assert model.config._experts_implementation == "pomona_grouped_mm"
    found = computed(site, *given)
    assert torch.equal(found[0], expected[0])
    for one, other in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(one, other)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_expert_without_tokens_and_no_tokens_at_all():
    model = FAMILIES["mixtral"]()
    model.set_experts_implementation("grouped_mm")
    site = find_expert_sites(model)[0]
    use_frozen_experts(model)
    x_ND = torch.randn(3, site.hidden_size)
    index_N1 = torch.full((3, 1), 2)
    found = site.experts(x_ND, index_N1, torch.ones(3, 1))
    torch.testing.assert_close(found, site.apply(x_ND, 2), rtol=1e-4, atol=1e-5)
    none = site.experts(x_ND[:0], index_N1[:0], torch.ones(0, 1))
    assert none.shape == (0, site.hidden_size)


def test_other_implementations_and_dense_models_are_left_alone():
    model = FAMILIES["mixtral"]()
    model.set_experts_implementation("eager")
    use_frozen_experts(model)
    assert model.config._experts_implementation == "eager"
    use_frozen_experts(llama())
