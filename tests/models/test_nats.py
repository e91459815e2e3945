"""Nats without logits of all tokens at once, beside cross-entropy of all logits."""

import pytest
import torch
from families import FAMILIES, VOCABULARY, double
from torch import nn
from torch.nn import functional as fn

from pomona.data.examples import Example, pack
from pomona.models import nats
from pomona.models.logits import packed_predictions
from pomona.models.packing import can_pack, packing_of

TOKENS, WIDTH = 23, 8


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("at_once", [1, 5, 23, 100])
def test_value_and_gradient_are_those_of_cross_entropy(monkeypatch, at_once, biased):
    monkeypatch.setattr(nats, "_tokens_at_once", lambda device, vocabulary: at_once)
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(WIDTH, VOCABULARY, bias=biased).double().requires_grad_(False)
    hidden_ZD = torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    hidden_ZD.requires_grad_()
    token_Z = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    seen_Z = torch.randn(TOKENS, generator=generator)
    found = nats.nats_of(hidden_ZD, head, token_Z)
    expected = fn.cross_entropy(head(hidden_ZD), token_Z, reduction="none")
    torch.testing.assert_close(found, expected.float())
    (ours,), (theirs,) = (
        torch.autograd.grad(y, hidden_ZD, seen_Z.to(y)) for y in (found, expected)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_no_tokens_have_no_nats():
    head = nn.Linear(WIDTH, VOCABULARY).requires_grad_(False)
    assert nats.nats_of(torch.zeros(0, WIDTH), head, torch.zeros(0, dtype=torch.int64)).shape == (
        0,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_predictions_are_those_of_the_models_own_logits(family):
    """Twice: the first pass of a model tells whether its output embedding has the last word."""
    model = double(family)
    model.requires_grad_(False)
    if not can_pack(model, 8):
        pytest.skip("does not pack")
    rows = [[Example((5, 6, 7, 8), 2)], [Example((9, 4, 3, 11, 12), 1)]]
    packed = pack(rows)
    packing = packing_of(packed.lengths, torch.device("cpu"))
    scored, said = torch.tensor([3, 5, 8]), torch.tensor([2, 6])
    whole = [
        model(input_ids=torch.tensor([own[0].input_ids]), use_cache=False).logits[0] for own in rows
    ]
    before = torch.cat(whole)[torch.cat([scored, said]) - 1]
    expected = fn.cross_entropy(before[:3], packed.input_ids_N[scored], reduction="none").float()
    for _ in range(2):
        found, logits = packed_predictions(model, packed.input_ids_N, scored, said, packing)
        torch.testing.assert_close(found.float(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(logits, before[3:], rtol=1e-6, atol=1e-6)
    assert not model.get_output_embeddings()._forward_pre_hooks
    assert not model.get_output_embeddings()._forward_hooks
