"""The reference of recipes: every key of every table is there, and its docstring says what it means."""

import dataclasses
import re

import pytest
from conftest import ROOT
from settings_tables import meanings, settings_tables, tables

from pomona.federation.settings import FederateSettings
from pomona.pipelines.federate.policy import Policy
from pomona.recipe.reconstruct import ReconstructRecipe
from pomona.recipe.registries import REGISTRIES

ROOTS = (FederateSettings, ReconstructRecipe, Policy)
FOUND = {cls for root in ROOTS for cls in tables(root)}
MEMBERS = {cls for kind in FOUND & REGISTRIES.keys() for cls in REGISTRIES[kind].values()}
CLASSES = sorted(
    (FOUND - REGISTRIES.keys()) | MEMBERS, key=lambda cls: f"{cls.__module__}.{cls.__name__}"
)


def test_every_registry_can_be_reached():
    assert REGISTRIES.keys() <= FOUND
    assert len(CLASSES) > 60


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: f"{cls.__module__}.{cls.__name__}")
def test_a_docstring_tells_every_key_and_no_other(cls):
    assert meanings(cls).keys() == {field.name for field in dataclasses.fields(cls)}
    assert all(text.endswith(".") for text in meanings(cls).values())


@pytest.mark.parametrize("root", ROOTS, ids=lambda cls: cls.__name__)
def test_every_key_is_on_the_page(root):
    text = settings_tables(root)
    reached = tables(root)
    for cls in reached.keys() - REGISTRIES.keys():
        for field in dataclasses.fields(cls):
            assert f"\n| `{field.name}` | " in text, (cls, field.name)
    for protocol in reached.keys() & REGISTRIES.keys():
        for kind, cls in REGISTRIES[protocol].items():
            _, _, after = text.partition(f"{{#{protocol.__name__.lower()}-{kind}}}")
            assert after, (protocol, kind)
            own = re.split(r"\n###", after)[0]
            assert re.findall(r"^\| `(\w+)` \|", own, re.M) == [
                f.name for f in dataclasses.fields(cls)
            ]


def test_links_within_a_page_find_their_table():
    for root in ROOTS:
        text = settings_tables(root)
        anchors = re.findall(r"\{#([\w-]+)\}", text)
        assert len(set(anchors)) == len(anchors)
        assert set(re.findall(r"\]\(#([\w-]+)\)", text)) <= set(anchors)


def test_the_pages_have_them():
    text = "".join(
        (ROOT / f"docs/{n}.md").read_text("utf-8") for n in ("settings", "settings-reconstruct")
    )
    named = re.findall("<!-- generated: settings of (.+) -->", text)
    assert named == ["federate", "policy", "reconstruct"]
