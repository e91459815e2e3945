"""Updates in eight bits: what is lost is bounded, remembered and sent later."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pomona.federation.compression import (
    BLOCK,
    compress,
    compressed_form,
    error_of,
    restore,
    with_error,
    without_error,
)
from pomona.models.weights import serialized_bytes


@given(
    shape=st.lists(st.integers(1, 40), min_size=0, max_size=3),
    kind=st.sampled_from([torch.float32, torch.bfloat16]),
    scale=st.sampled_from([0.0, 1e-30, 1e-4, 1.0, 1e6]),
)
def test_rounding_loses_less_than_a_step_and_remembers_it(shape, kind, scale):
    generator = torch.Generator().manual_seed(0)
    sent = {"a": torch.randn(shape, generator=generator).to(kind)}
    values = {"a": (sent["a"].float() + scale * torch.randn(shape, generator=generator)).to(kind)}
    done = compress(sent, values, {})
    assert done.shared["a"].dtype == kind
    assert torch.equal(restore(sent, done.wire)["a"], done.shared["a"])
    largest = float((values["a"].double() - sent["a"].double()).abs().max())
    resolution = torch.finfo(kind).eps * float(done.shared["a"].double().abs().max())
    step = largest / 254 * (1 + 1e-5) + resolution + 1e-40
    assert float(done.error["a"].abs().max()) <= step
    wanted = values["a"].double() - done.shared["a"].double()
    assert torch.allclose(done.error["a"].double(), wanted, rtol=1e-6, atol=1e-44)


def test_what_is_too_small_for_a_round_arrives_over_many():
    """Beside a large change a small one is rounded away, unless what was lost is remembered."""
    sent = {"a": torch.zeros(BLOCK)}
    change = torch.full((BLOCK,), 1e-3)
    change[0] = 1.0
    forgetful = compress(sent, {"a": change}, {}).shared["a"]
    assert forgetful[1:].count_nonzero() == 0
    total, error = torch.zeros(BLOCK), {}
    for _ in range(300):
        done = compress(sent, {"a": change}, error)
        total, error = total + done.shared["a"], done.error
    assert torch.allclose(total / 300, change, rtol=0.02)
    assert float(error["a"].abs().max()) <= 1.0 / 127


def test_a_block_is_rounded_by_its_own_largest_value():
    sent = {"a": torch.zeros(2 * BLOCK + 3)}
    change = torch.full((2 * BLOCK + 3,), 1e-4)
    change[0] = 1e4
    done = compress(sent, {"a": change}, {})
    assert done.shared["a"][1:BLOCK].count_nonzero() == 0
    assert torch.allclose(done.shared["a"][BLOCK:], change[BLOCK:], rtol=1e-5)


def test_what_the_server_did_not_send_travels_as_it_is():
    sent, other = {"a": torch.zeros(4)}, torch.randn(3)
    done = compress(sent, {"a": torch.ones(4), "report": other}, {})
    assert torch.equal(done.wire["report"], other)
    assert torch.equal(done.shared["report"], other)
    assert set(done.error) == {"a"}


def test_it_takes_a_quarter_and_its_form_is_known_before():
    sent = {"a": torch.zeros(64, 512), "b": torch.zeros(512, 64)}
    values = {name: torch.randn_like(value) for name, value in sent.items()}
    wire = compress(sent, values, {}).wire
    form = compressed_form(sent, values)
    assert {n: (v.shape, v.dtype) for n, v in wire.items()} == {
        n: (v.shape, v.dtype) for n, v in form.items()
    }
    assert serialized_bytes(form) == serialized_bytes(wire)
    assert serialized_bytes(wire) / serialized_bytes(values) == pytest.approx(0.256, abs=0.004)


def test_a_clients_memory_keeps_it_apart():
    memory = {"optimiser.step": torch.tensor(3)}
    kept = with_error(memory, {"a": torch.ones(2)})
    assert torch.equal(error_of(kept)["a"], torch.ones(2))
    assert without_error(kept) == memory
    assert error_of(with_error(kept, {"b": torch.ones(1)})).keys() == {"b"}
