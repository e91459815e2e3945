"""Whatever comes over the network or in a file is taken, or refused in a sentence; nothing else happens.

A bounded number of examples here; `make fuzz` takes POMONA_FUZZ of them.
"""

import json
import os
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import pytest
import tomli_w
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pomona.data.rows import read_rows
from pomona.errors import PomonaError
from pomona.federation.settings import FederateSettings
from pomona.flower.records import as_records, from_records
from pomona.models.received import check_like, check_values, decoded, encoded
from pomona.parcel import Parcel, dumped, loaded
from pomona.pipelines.federate.heard import answers_of, check_told, lines_of, presented
from pomona.recipe.remote import at_site

EXAMPLES = int(os.environ.get("POMONA_FUZZ", "40"))
fuzzed = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="POMONA_FUZZ" not in os.environ,
    suppress_health_check=list(HealthCheck),
)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
jsons = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4)
    ),
    max_leaves=8,
)
WHOLE = encoded({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)})


@st.composite
def mutated(draw, whole: bytes) -> bytes:
    """Bytes that are almost right: some replaced, cut off or added."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(data)))
        data[place : place + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return bytes(data[: draw(st.integers(0, len(data)))]) if draw(st.booleans()) else bytes(data)


@fuzzed
@given(st.binary(max_size=200) | mutated(WHOLE))
def test_tensors_of_anybody(data):
    try:
        tensors = decoded(data)
        check_like(tensors, {"a": torch.zeros(2, 3), "b": torch.zeros(2, dtype=torch.bfloat16)})
        check_values(tensors, {}, 10.0)
    except PomonaError:
        return
    assert set(tensors) == {"a", "b"}


@fuzzed
@given(st.binary(max_size=100) | mutated(dumped({"round": 1, "rows": [1, 2.5, None, "x"]})))
def test_json_of_anybody(data):
    try:
        told = loaded(data)
    except PomonaError:
        return
    assert isinstance(told, dict)
    assert loaded(dumped(told)) == told


LINE = {
    "client": "a",
    "model": "base",
    "round": 0,
    "loss": 1.0,
    "perplexity": 2.7,
    "rows": 1,
    "tokens": 2,
}
TOLD = {
    "site": "a",
    "federation": "f",
    "round": 1,
    "rows": [["base", 1.0, 2, None, None]],
    "losses": [1.0],
    "loss": None,
    "epsilon": None,
    "model": {"x": "y"},
    "train": 1,
    "test": 1,
    "lines": [LINE],
}


@fuzzed
@given(st.dictionaries(st.sampled_from(sorted(TOLD)), jsons, max_size=3))
@example({})
def test_what_sites_say(changes):
    told = {**TOLD, **changes}
    heard = (
        lambda: presented("a", Parcel("here", told), {"x": "y"}),
        lambda: lines_of("a", told),
        lambda: answers_of("a", told),
        lambda: check_told(Parcel("update", told, b"x"), "f", 1, 5),
        lambda: check_told(Parcel("update", {**told, "rows": 5}, b"x"), "f", 1, 5),
    )
    for one in heard:
        try:
            found = one()
        except PomonaError:
            continue
        json.dumps(getattr(found, "lines", found), allow_nan=False)


@fuzzed
@given(st.text(max_size=80))
def test_recipes_of_any_text(text):
    with pytest.raises(PomonaError):
        at_site(text + "\n= broken", "model")
    with suppress(PomonaError):
        at_site(text, "model")


KEYS = sorted(field.name for field in fields(FederateSettings))


@fuzzed
@given(st.dictionaries(st.sampled_from(KEYS), jsons, min_size=1, max_size=3))
def test_recipes_of_any_values(table):
    try:
        text = tomli_w.dumps(table)
    except (TypeError, ValueError, AttributeError):
        return  # TOML has no null
    try:
        made = at_site(text, "model")
    except PomonaError:
        return
    assert isinstance(made, FederateSettings)


@fuzzed
@given(st.sampled_from([".jsonl", ".json", ".csv", ".parquet"]), st.binary(max_size=200))
@example(".jsonl", b'{"instruction": "a", "response": "b"}\n\xff')
def test_files_of_any_content(tmp_path_factory, suffix, content):
    path = tmp_path_factory.mktemp("rows") / f"rows{suffix}"
    path.write_bytes(content)
    try:
        rows = read_rows(path)
    except PomonaError as error:
        assert Path(path).name in str(error)
        return
    assert rows


@fuzzed
@given(st.text(max_size=20), st.dictionaries(st.text(max_size=5), scalars.filter(lambda v: v == v)))
def test_parcels_go_through_flower_as_they_are(kind, told):
    told = {k: v for k, v in told.items() if not (isinstance(v, float) and abs(v) == float("inf"))}
    for tensors in (b"", WHOLE, bytes(1 << 21)):
        parcel = Parcel(kind, told, tensors)
        assert from_records(as_records(parcel)) == parcel
