"""The recipes that come with Pomona."""

import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any

import tomli_w

from pomona.errors import PomonaError


def recipes() -> dict[str, str]:
    """Return every recipe's first sentence by name."""
    return {path.stem: _about(path.read_text("utf-8")) for path in _files()}


def recipe_text(name: str) -> str:
    """Return a recipe as it stands; raises `PomonaError` for one that does not exist."""
    path = _folder() / f"{name}.toml"
    if name not in recipes():
        raise PomonaError(f'there is no recipe "{name}"; there are {", ".join(recipes())}')
    return path.read_text("utf-8")


def new_recipe(name: str, model: str, clients: str) -> str:
    """Return a recipe for one's own model and clients (or domains), with what it says of itself.

    Raises `PomonaError` for a recipe that does not exist.
    """
    text = recipe_text(name)
    table = tomllib.loads(text)
    head = "".join(line for line in _comments(text) if "--model" not in line)
    if "settings" in table:
        return f'{head}model = "{model}"\ndomains = "{clients}"\n\n{tomli_w.dumps(table)}'
    told: dict[str, Any] = {"name": table.pop("name", name), "model": model}
    table.pop("model", None)
    told |= {key: value for key, value in table.items() if not isinstance(value, dict)}
    tables = {key: value for key, value in table.items() if isinstance(value, dict)}
    return head + tomli_w.dumps({**told, **tables, "data": {"folder": clients}})


def _about(text: str) -> str:
    said = " ".join(line.removeprefix("#").strip() for line in _comments(text))
    return said.partition(". ")[0].removesuffix(".")


def _comments(text: str) -> list[str]:
    lines = text.splitlines(keepends=True)
    end = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return lines[:end]


def _files() -> list[Path]:
    return sorted(_folder().glob("*.toml"), key=lambda path: path.stem)


def _folder() -> Path:
    packaged = Path(str(files("pomona"))) / "recipes"
    return packaged if packaged.is_dir() else Path(__file__).parents[3] / "recipes"
