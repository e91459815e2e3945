"""Whose token is whose: what is computed client by client, beside a loop over the clients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pomona.models.split import Even, Present, Ragged, frozen_products

CPU = torch.device("cpu")
TYPES = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 0.1}


def random(generator, *shape, dtype):
    made = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return made.to(dtype).requires_grad_()


def one_by_one(x_NI, weight_CIO, sizes):
    parts = zip(x_NI.split(list(sizes)), weight_CIO, strict=True)
    return torch.cat([own @ weight for own, weight in parts])


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(0, 5), min_size=2, max_size=5).filter(any),
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from(list(TYPES)),
)
def test_a_product_is_every_clients_own_in_value_and_gradient(sizes, size_in, size_out, dtype):
    """Widths that are no multiple of what grouped products take, clients without tokens, every type."""
    generator = torch.Generator().manual_seed(0)
    x_NI = random(generator, sum(sizes), size_in, dtype=dtype)
    weight_CIO = random(generator, len(sizes), size_in, size_out, dtype=dtype)
    seen_NO = random(generator, sum(sizes), size_out, dtype=dtype).detach()
    found = Ragged(tuple(sizes), CPU).product(x_NI, weight_CIO)
    expected = one_by_one(x_NI, weight_CIO, sizes)
    close = {"rtol": TYPES[dtype], "atol": TYPES[dtype]}
    torch.testing.assert_close(found, expected, **close)
    ours = torch.autograd.grad(found, (x_NI, weight_CIO), seen_NO)
    theirs = torch.autograd.grad(expected, (x_NI, weight_CIO), seen_NO)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, **close)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2)), min_size=1, max_size=6).filter(
        lambda drawn: any(size for size, _ in drawn)
    ),
    st.booleans(),
)
def test_products_with_constants_are_every_clients_own_and_share_neighbours(drawn, transposed):
    """Any clients with the same matrix, neighbours or not, and matrices that lie the other way round."""
    generator = torch.Generator().manual_seed(0)
    sizes, which = zip(*drawn, strict=True)
    constants = torch.randn(3, 4, 7, generator=generator, dtype=torch.float64)
    own = [constants[k] for k in which]
    if transposed:
        own = [constant.T.contiguous().T for constant in own]
    x_NI = random(generator, sum(sizes), 7, dtype=torch.float64)
    seen_NO = random(generator, sum(sizes), 4, dtype=torch.float64).detach()
    found = frozen_products(x_NI, own, Ragged(sizes, CPU))
    expected = one_by_one(x_NI, torch.stack(own).mT, sizes)
    torch.testing.assert_close(found, expected)
    (ours,), (theirs,) = (torch.autograd.grad(y, x_NI, seen_NO) for y in (found, expected))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("clients", [1, 2, 3])
def test_an_even_split_is_a_ragged_one_of_equal_sizes(clients):
    generator = torch.Generator().manual_seed(0)
    even, ragged = Even(12, clients, CPU), Ragged((12 // clients,) * clients, CPU)
    assert list(even.sizes) == list(ragged.sizes)
    assert torch.equal(even.client_N, ragged.client_N)
    x_NI = random(generator, 12, 5, dtype=torch.float64)
    weight_CIO = random(generator, clients, 5, 3, dtype=torch.float64)
    torch.testing.assert_close(even.product(x_NI, weight_CIO), ragged.product(x_NI, weight_CIO))


def test_tokens_that_belong_to_nobody_are_an_error():
    x_NI = torch.zeros(7, 2)
    present = Present()
    assert present.of(x_NI, 7).sizes == [1] * 7
    with pytest.raises(RuntimeError, match="7 tokens cannot be split evenly among 2 clients"):
        present.of(x_NI, 2)
    present.split = Ragged((3, 4), CPU)
    assert present.of(x_NI, 2) is present.split
    assert isinstance(present.of(x_NI, 1), Even)
    for tokens, clients in ((torch.zeros(8, 2), 2), (x_NI, 7)):
        with pytest.raises(RuntimeError, match="are not the pass's packed ones"):
            present.of(tokens, clients)
