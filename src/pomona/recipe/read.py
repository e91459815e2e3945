"""From a TOML file to the settings of a pipeline."""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pomona.errors import PomonaError
from pomona.recipe.build import build
from pomona.recipe.changes import changed

Settings = TypeVar("Settings")


def read_recipe(
    path: Path,
    settings: type[Settings],
    overrides: Mapping[str, Any] | None = None,
    changes: Sequence[str] = (),
) -> Settings:
    """Read a recipe as the settings of one pipeline, `overrides` replacing top-level keys.

    `changes` are those of `--set` (`recipe.changes`).

    Paths in it are relative to the recipe's folder; `$NAME` stands for an environment variable.
    Raises `PomonaError` naming the file and the key.
    """
    table = changed(read_table(path), changes)
    given = {key: value for key, value in (overrides or {}).items() if value is not None}
    return build(settings, {**table, **given}, path.parent.resolve(), str(path))


def read_table(path: Path) -> dict[str, Any]:
    """Return a TOML file's table; raises `PomonaError` naming the file and what is wrong with it."""
    try:
        return tomllib.loads(path.read_text("utf-8-sig"))
    except OSError as error:
        raise PomonaError(
            f"cannot read the recipe {path}: {error.strerror}; check the path"
        ) from error
    except UnicodeDecodeError as error:
        raise PomonaError(f"the recipe {path} is not UTF-8 text; save it as UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise PomonaError(f"the recipe {path} is not valid TOML: {error}") from error
