"""The pages of the documentation as tests read them: blocks of code, links, anchors, recipes."""

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from conftest import ROOT
from generated import filled
from markdown_it import MarkdownIt
from markdown_it.token import Token

from pomona.federation.settings import FederateSettings
from pomona.pipelines.federate.policy import Policy
from pomona.recipe import build
from pomona.recipe.reconstruct import ReconstructRecipe

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
_PARSER = MarkdownIt("commonmark").enable("table")
SHELL = ("", "sh", "bash", "console")


@dataclass(frozen=True)
class Block:
    """A fenced block: the page and line it stands at, its language, what is in it."""

    where: str
    language: str
    text: str


@cache
def tokens(name: str, built: bool = False) -> list[Token]:
    """A page as it is written or, `built`, with what is generated."""
    text = (ROOT / name).read_text("utf-8")
    return _PARSER.parse(filled(text) if built else text)


def blocks(*languages: str) -> list[Block]:
    return [
        Block(f"{name}:{token.map[0] + 1}", token.info.strip(), token.content)
        for name in NAMES
        for token in tokens(name)
        if token.type == "fence" and token.info.strip() in languages
    ]


def inline(name: str) -> Iterator[Token]:
    for token in tokens(name):
        yield from token.children or ()


def links(name: str) -> list[str]:
    """What a page links to, pictures too, as written."""
    found = [token.attrGet("href") or token.attrGet("src") for token in inline(name)]
    return [str(target) for target in found if target]


@cache
def anchors(name: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found = tokens(name, built=True)
    heads = [found[i + 1] for i, token in enumerate(found) if token.type == "heading_open"]
    return {_anchor("".join(t.content for t in head.children or ())) for head in heads}


def _anchor(heading: str) -> str:
    given = re.search(r"\{#([\w-]+)\}$", heading)
    return given[1] if given else re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-")


def exists(page: Path, link: str) -> bool:
    """Whether a relative link finds its file, and its anchor there."""
    path, _, anchor = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    if not target.is_relative_to(ROOT) or not target.exists():
        return False
    return not anchor or anchor in anchors(str(target.relative_to(ROOT)))


def read(table: dict[str, Any], where: str) -> object:
    """Read a table, or a part of one, by the reader whose keys it has."""
    for kind, given in (
        (Policy, {}),
        (ReconstructRecipe, {"model": "model", "domains": "domains"}),
        (FederateSettings, {"model": "model"}),
    ):
        if kind is FederateSettings or table.keys() <= {f.name for f in dataclasses.fields(kind)}:
            return build(kind, {**given, **table}, Path("/nowhere"), where)
    raise AssertionError(where)
