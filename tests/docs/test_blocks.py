"""Blocks of Python and TOML in the docs: they parse, what they import is there, recipes are read as recipes."""

import ast
import dataclasses
import importlib
import inspect
import pkgutil
import re
import tomllib
from typing import Any

import pytest
from conftest import ROOT
from pages import SHELL, Block, blocks, read

import pomona
from pomona.recipe.registries import REGISTRIES, lacking

PYTHON, TOML = blocks("python"), blocks("toml")
WRITTEN = [
    Block(block.where, "toml", text.replace("\\n", "\n"))
    for block in blocks(*SHELL)
    for text in re.findall(r"^printf '(.*)' > \S+\.toml$", block.text, re.M)
]
DEFINITIONS = (ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef, ast.Expr)


def where(block: Block) -> str:
    return block.where


def test_blocks_were_found():
    assert len(PYTHON) >= 5 and len(TOML) >= 5 and WRITTEN
    assert any(defines(block) for block in PYTHON)


def defines(block: Block) -> bool:
    """Whether a block only says what something is, as those that show how to add something."""
    body = ast.parse(block.text).body
    calls = [
        node for node in body if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    ]
    return all(isinstance(node, DEFINITIONS) for node in body) and not calls


@pytest.mark.parametrize("block", PYTHON, ids=where)
def test_what_python_uses_of_pomona_is_there(block):
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pomona"):
            module = importlib.import_module(node.module)
            assert [n.name for n in node.names if not hasattr(module, n.name)] == []
        elif isinstance(node, ast.Import):
            for name in (n.name for n in node.names if n.name.startswith("pomona")):
                importlib.import_module(name)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).startswith("pomona."):
            function = getattr(pomona, ast.unparse(node.func).removeprefix("pomona."))
            named = {word.arg: word.value for word in node.keywords}
            inspect.signature(function).bind(*node.args, **named)


@pytest.mark.parametrize("block", [b for b in PYTHON if defines(b)], ids=where)
def test_what_python_defines_fulfils_a_protocol(block):
    """A class of the docs is one that a recipe could name."""
    found: dict[str, Any] = {"__name__": "of_the_docs"}
    exec(compile(block.text, block.where, "exec"), found)
    own = [v for v in found.values() if getattr(v, "__module__", "") == "of_the_docs"]
    made = [kind() for kind in own if dataclasses.is_dataclass(kind)]
    assert len(made) == 1
    assert None in [lacking(protocol, made[0]) for protocol in REGISTRIES]


@pytest.mark.parametrize("block", [*TOML, *WRITTEN], ids=where)
def test_toml_is_read_as_a_recipe_or_a_policy(block, monkeypatch):
    monkeypatch.setenv("POMONA_DATA", str(ROOT))
    assert read(tomllib.loads(block.text), block.where)


def test_the_reference_of_python_names_what_is_there():
    named = re.findall(r"^::: (\S+)$", (ROOT / "docs/api.md").read_text("utf-8"), re.M)
    assert len(named) > 15
    for name in named:
        assert pkgutil.resolve_name(name) is not None
