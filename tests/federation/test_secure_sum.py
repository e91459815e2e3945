"""Sums under masks: bit for bit the sum, whoever is lost, and nothing else."""

import os

import pytest
import torch

from pomona.errors import PomonaError
from pomona.federation.masks import Keys, Masks, Unmasking
from pomona.federation.secure_sum import in_integers, summed
from pomona.federation.strategies.fedavg import weighted_mean
from pomona.federation.update import Update

SESSION = "federation/1/a"


def clients(count: int, session: str = SESSION) -> dict[str, Masks]:
    return {f"s{i}": Masks(f"s{i}", session, os.urandom(32)) for i in range(count)}


def values_of(names) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: {
            "b": torch.randint(-(2**40), 2**40, (3, 5), generator=generator),
            "a": torch.randint(-9, 9, (300,), generator=generator),
        }
        for name in names
    }


def unmasking(masks: dict[str, Masks], answered: list[str], opening: list[str], threshold: int):
    peers = {name: own.keys for name, own in masks.items()}
    shares = {name: own.shares(peers, threshold) for name, own in masks.items()}
    opened = {
        name: masks[name].opened({f: own[name] for f, own in shares.items()}, peers, answered)
        for name in opening
    }
    return Unmasking.of(SESSION, peers, answered, opened, threshold)


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_the_sum_comes_out_bare_and_nobody_alone(lost):
    masks = clients(5)
    peers = {name: own.keys for name, own in masks.items()}
    names = list(masks)
    answered, values = names[lost:], values_of(names)
    hidden = {name: masks[name].masked(values[name], peers) for name in answered}
    found = unmasking(masks, answered, answered[-3:], 3)
    bare = {name: found.bared(name, hidden[name]) for name in answered}
    for key in ("a", "b"):
        wanted = sum(values[name][key] for name in answered)
        assert torch.equal(sum(own[key] for own in bare.values()), wanted)
        for name in answered:
            # hardly a value is what it was, though its own mask is known
            assert (bare[name][key] == values[name][key]).float().mean() < 0.01
            assert (hidden[name][key] == values[name][key]).float().mean() < 0.01
        some = sum(bare[name][key] for name in answered[:2])
        part = sum(values[name][key] for name in answered[:2])
        assert (some == part).float().mean() < 0.01


def test_masks_look_random():
    """Every byte of a mask of zeros is as frequent as any other."""
    masks = clients(3)
    peers = {name: own.keys for name, own in masks.items()}
    hidden = masks["s0"].masked({"a": torch.zeros(100_000, dtype=torch.int64)}, peers)["a"]
    counts = torch.bincount(hidden.view(torch.uint8).long(), minlength=256).double()
    expected = counts.sum() / 256
    assert float(((counts - expected).square() / expected).sum()) < 400  # chi², 255 degrees


def test_a_client_that_was_restarted_draws_the_same_masks():
    one = clients(3)["s0"]
    again = Masks(one.client, one.session, one.secret)
    assert one.keys == again.keys
    other = Masks(one.client, "federation/2/a", one.secret)
    assert one.keys.masks != other.keys.masks
    assert one.keys.own != other.keys.own


def test_too_few_shares_open_nothing():
    masks = clients(5)
    with pytest.raises(PomonaError, match="2 sites have opened their shares and 3 are needed"):
        unmasking(masks, list(masks), ["s0", "s1"], 3)


@pytest.mark.parametrize("threshold", [0, 2, 6])
def test_masks_that_half_or_fewer_could_open_are_not_made(threshold):
    masks = clients(5)
    peers = {name: own.keys for name, own in masks.items()}
    with pytest.raises(PomonaError, match="more than half of them are needed"):
        masks["s0"].shares(peers, threshold)


def test_a_client_is_not_fooled():
    masks = clients(4)
    peers = {name: own.keys for name, own in masks.items()}
    shares = {name: own.shares(peers, 3) for name, own in masks.items()}
    mine = {name: own["s0"] for name, own in shares.items()}
    with pytest.raises(PomonaError, match="as if it were lost"):
        masks["s0"].opened(mine, peers, ["s1", "s2", "s3"])
    swapped = {**mine, "s1": mine["s2"]}
    with pytest.raises(PomonaError, match='shares of "s1" were not sealed by it'):
        masks["s0"].opened(swapped, peers, list(masks))
    foreign = {**peers, "s0": clients(1)["s0"].keys}
    with pytest.raises(PomonaError, match="not its own"):
        masks["s0"].masked({}, foreign)
    with pytest.raises(PomonaError, match="public key of a site's masks is none"):
        none = {**peers, "s1": Keys(bytes(32), bytes(32), bytes(32))}
        masks["s0"].masked({"a": torch.zeros(1, dtype=torch.int64)}, none)
    with pytest.raises(PomonaError, match="32 bytes each"):
        Keys(b"", b"", b"")


def test_wrong_shares_are_noticed():
    masks = clients(4)
    peers = {name: own.keys for name, own in masks.items()}
    shares = {name: own.shares(peers, 3) for name, own in masks.items()}
    for answered in (list(masks), ["s0", "s1", "s2"]):
        opened = {
            name: masks[name].opened({f: own[name] for f, own in shares.items()}, peers, answered)
            for name in ("s0", "s1", "s2")
        }
        false = opened["s1"]["s3"]
        opened["s1"]["s3"] = false[:-1] + bytes([false[-1] ^ 1])
        with pytest.raises(PomonaError, match='shares of "s3" do not give the seed'):
            Unmasking.of(SESSION, peers, answered, opened, 3)


def test_a_sum_in_integers_is_the_mean_by_rows():
    generator = torch.Generator().manual_seed(2)
    sent = {"a": torch.randn(50, generator=generator), "b": torch.zeros(7, dtype=torch.bfloat16)}
    updates = [
        Update(
            f"c{i}",
            rows,
            {n: v + torch.randn(v.shape, generator=generator).to(v.dtype) for n, v in sent.items()},
        )
        for i, rows in enumerate((1, 40, 17_000))
    ]
    encoded = [Update(u.client, u.rows, in_integers(sent, u)) for u in updates]
    (mean,) = summed(sent, encoded)
    assert mean.rows == 17_041
    wanted = weighted_mean(updates)
    assert torch.allclose(mean.shared["a"], wanted["a"], atol=1e-8, rtol=1e-6)
    assert mean.shared["b"].dtype == torch.bfloat16
    assert torch.allclose(mean.shared["b"].float(), wanted["b"].float(), rtol=0.01)
    assert list(summed(sent, [])) == []


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e9])
def test_what_cannot_be_added_up_is_refused(value):
    update = Update("pears", 1, {"a": torch.tensor([0.0, value])})
    with pytest.raises(PomonaError, match='client "pears" is not finite or too large'):
        in_integers({"a": torch.zeros(2)}, update)
