"""Two gated activations written out, beside what torch makes of them."""

import pytest
import torch

from pomona.models.gated import gated, gated_pair, plain_gated, plain_gated_pair


@pytest.mark.parametrize("needed", [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_value_and_gradient_are_those_of_the_plain_twin(dtype, needed):
    generator = torch.Generator().manual_seed(0)
    given = [
        torch.randn(9, 10, generator=generator, dtype=dtype).requires_grad_(needs)
        for needs in needed
    ]
    weights = [torch.randn(9, 5, generator=generator, dtype=dtype) for _ in range(2)]
    leaves = [tensor for tensor in given if tensor.requires_grad]
    for seen in (
        weights,
        [weights[0], None],
        [None, weights[1]],
    ):  # both parts, or one of them, are used

        def pulled(pair, seen=seen):
            used = [(y * w).sum() for y, w in zip(pair(*given), seen, strict=True) if w is not None]
            if not sum(used).requires_grad:
                return []
            return torch.autograd.grad(sum(used), leaves, allow_unused=True, materialize_grads=True)

        for one, other in zip(gated_pair(*given), plain_gated_pair(*given), strict=True):
            assert torch.equal(one, other)
        for one, other in zip(pulled(gated_pair), pulled(plain_gated_pair), strict=False):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_alone_is_its_plain_twin(dtype):
    generator = torch.Generator().manual_seed(0)
    both_NX = torch.randn(9, 10, generator=generator, dtype=dtype).requires_grad_()
    pull_NW = torch.randn(9, 5, generator=generator, dtype=dtype)
    assert torch.equal(gated(both_NX), plain_gated(both_NX))
    found, expected = (
        torch.autograd.grad((way(both_NX) * pull_NW).sum(), both_NX) for way in (gated, plain_gated)
    )
    torch.testing.assert_close(found, expected)


def test_an_expert_that_has_not_moved_differs_by_exactly_nothing():
    both_NX = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    _, moved_NW = gated_pair(both_NX, both_NX.clone())
    assert torch.equal(moved_NW, torch.zeros(4, 3))
