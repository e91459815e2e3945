"""Every relative link of README, CHANGELOG and docs/ leads somewhere, to its heading too."""

import pytest
from conftest import ROOT
from pages import NAMES, exists, links


def test_pages_were_found():
    assert {"README.md", "CHANGELOG.md", "docs/tour.md"} <= set(NAMES)
    assert len(NAMES) > 25
    assert sum(len(links(name)) for name in NAMES) > 60


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    own = [link for link in links(name) if not link.startswith(("https://", "http://"))]
    assert [link for link in own if not exists(ROOT / name, link)] == []


def test_a_dead_link_is_seen():
    page = ROOT / "docs/tour.md"
    assert exists(page, "recipes.md#rows") and exists(page, "#serving")
    assert not exists(page, "recipes.md#no-such-heading")
    assert not exists(page, "no-such-page.md")
