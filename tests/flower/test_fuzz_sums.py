"""What anybody may send of masks and of updates in eight bits is taken, or refused in a sentence."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_fuzz import fuzzed, jsons, mutated

from pomona.errors import PomonaError
from pomona.federation.masks import Keys, Masks, Unmasking, session_of
from pomona.federation.settings import FederateSettings
from pomona.federation.strategies import FedAvg
from pomona.federation.update import Update
from pomona.federation.wire import from_wire, to_wire, wire_form
from pomona.models.received import check_like, check_values, decoded, encoded
from pomona.parcel import Parcel
from pomona.pipelines.federate.heard import keys_of, peers_of, shares_of
from pomona.pipelines.federate.site_masks import SiteMasks, told_keys

NAMES = ("a", "b", "c", "d")
SESSION = session_of("f", 1, "s")
MASKS = {name: Masks(name, SESSION, name.encode() * 32) for name in NAMES}
PEERS = {name: own.keys for name, own in MASKS.items()}
SEALED = {name: own.shares(PEERS, 3) for name, own in MASKS.items()}
OPENED = {
    name: own.opened({n: s[name] for n, s in SEALED.items()}, PEERS, NAMES[:3])
    for name, own in MASKS.items()
    if name != "d"
}
KEYS = {name: told_keys(own) for name, own in PEERS.items()}
hexes = st.binary(max_size=40).map(bytes.hex) | mutated(b"0123456789abcdef" * 4).map(repr)
anything = jsons | st.dictionaries(
    st.sampled_from([*NAMES, "seals", "masks", "own"]), jsons | hexes
)


@fuzzed
@given(anything, st.sampled_from(NAMES))
def test_keys_and_shares_of_anybody(told, name):
    heard = (
        lambda: keys_of(told),
        lambda: keys_of({**KEYS[name], **(told if isinstance(told, dict) else {})}),
        lambda: peers_of({"keys": told}),
        lambda: peers_of({"keys": {**KEYS, name: told}}),
        lambda: shares_of(told, PEERS),
        lambda: shares_of({**dict.fromkeys(NAMES, "00"), name: told}, PEERS),
    )
    for one in heard:
        with suppress(PomonaError):
            found = one()
            values = found.values() if isinstance(found, dict) else [found]
            assert all(isinstance(value, Keys | bytes) for value in values)


@fuzzed
@given(st.sampled_from(NAMES), mutated(OPENED["a"]["b"]))
def test_a_share_that_was_changed_gives_no_sum(whose, share):
    if share == OPENED["a"][whose]:
        return
    opened = {**OPENED, "a": {**OPENED["a"], whose: share}}
    with pytest.raises(PomonaError):
        Unmasking.of(SESSION, PEERS, NAMES[:3], opened, 3)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> SiteMasks:
    folder: Path = tmp_path_factory.mktemp("state")
    (folder / "masks.key").write_bytes(b"a" * 32)
    return SiteMasks("a", "f", folder)


WHOLE = {
    "round": 1,
    "session": "s",
    "threshold": 3,
    "keys": KEYS,
    "answered": list(NAMES[:3]),
    "shares": {name: sealed["a"].hex() for name, sealed in SEALED.items()},
}


@fuzzed
@given(
    st.dictionaries(st.sampled_from(sorted(WHOLE)), anything, max_size=3),
    st.dictionaries(st.sampled_from(NAMES), hexes, max_size=2),
)
def test_a_site_that_is_asked_for_anything_answers_or_refuses(site, changes, shares):
    told = {**WHOLE, "shares": {**WHOLE["shares"], **shares}, **changes}
    update = encoded({"w": torch.arange(4)})
    for ask in (
        lambda asked: site.keys(asked),
        lambda asked: site.shares(asked),
        lambda asked: site.hide(Parcel("update", {}, update), asked),
        lambda asked: site.open(asked, 1),
    ):
        with suppress(PomonaError):
            assert isinstance(ask(Parcel("x", told)), Parcel)


def test_what_the_fuzzed_questions_are_changed_from_is_answered(site):
    asked = Parcel("x", WHOLE)
    assert peers_of(site.keys(asked).told | {"keys": {"a": site.keys(asked).told["keys"]}})
    assert set(site.shares(asked).told["shares"]) == set(NAMES)
    assert set(site.open(asked, 1).told["shares"]) == set(NAMES)
    assert set(Unmasking.of(SESSION, PEERS, NAMES[:3], OPENED, 3).own) == set(NAMES[:3])


SENT = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(300)}
EIGHT = FederateSettings("model", strategy=FedAvg(), compression="int8")
SUMS = replace(EIGHT, compression="none", secure_aggregation=True)


def travelled(settings: FederateSettings) -> bytes:
    moved = {name: value + 0.1 for name, value in SENT.items()}
    update, _ = to_wire(settings, SENT, Update("a", 5, moved), {}, {})
    return encoded(update.message)


@fuzzed
@given(st.data(), st.sampled_from([EIGHT, SUMS]))
def test_updates_in_another_form_of_anybody(data, settings):
    whole = travelled(settings)
    received = data.draw(st.just(whole) | st.binary(max_size=100) | mutated(whole))
    try:
        wire = decoded(received)
        check_like(wire, wire_form(settings, SENT, SENT))
        tensors = from_wire(settings, SENT, wire)
        if settings.compression == "int8":
            check_values(tensors, SENT, 10.0)
    except PomonaError:
        assert received != whole
        return
    assert {name: value.shape for name, value in tensors.items()} == {
        name: value.shape for name, value in SENT.items()
    }
