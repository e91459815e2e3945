"""The recipe of a federation as its sites get it: what they need to train, and no path of the coordinator's."""

import dataclasses
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import tomli_w

from pomona.errors import PomonaError
from pomona.federation.settings import FederateSettings
from pomona.recipe.build import build, table_of

_HERE = ("model", "data", "warm_start")
"""What is the coordinator's or the site's own."""
_CODE = re.compile(r"[\w.]+:[\w.]+")
_OF_EVALUATION = ("forgetting", "tasks", "task_data", "fewshot")


def for_sites(settings: FederateSettings) -> str:
    """Return the TOML text that sites are sent; raises `PomonaError` for what cannot be done across sites."""
    if settings.pooled:
        raise PomonaError(
            "pooled needs everybody's rows in one place; leave it out, or use pomona federate"
        )
    table = {key: value for key, value in table_of(settings).items() if key not in _HERE}
    evaluation = cast(dict[str, Any], table["evaluation"])
    table["evaluation"] = {k: v for k, v in evaluation.items() if k not in _OF_EVALUATION}
    return tomli_w.dumps(table)


def at_site(text: str, model: str, code: bool = False) -> FederateSettings:
    """Return the settings of a recipe from a coordinator, with the site's own model.

    Raises `PomonaError` for text that is no recipe, for one with a path in it, and unless `code` for one that
    names code outside Pomona.
    """
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise PomonaError(f"the coordinator's recipe is not valid TOML: {error}") from error
    for key in _HERE:
        if key in table:
            raise PomonaError(f"the coordinator's recipe has \"{key}\", which is a site's own")
    evaluation = table.get("evaluation")
    for key in _OF_EVALUATION if isinstance(evaluation, dict) else ():
        if key in cast(dict[str, Any], evaluation):
            raise PomonaError(
                f'the coordinator\'s recipe has "evaluation.{key}", which no site measures'
            )
    foreign = None if code else _foreign(table)
    if foreign is not None:
        raise PomonaError(
            f'the coordinator\'s recipe names code outside Pomona, "{foreign}"; a policy that lists the recipe '
            "accepts it"
        )
    named = {**table, "model": "the site's own"}
    settings = build(FederateSettings, named, Path("/nowhere"), "the coordinator's recipe")
    return dataclasses.replace(settings, model=model)


def _foreign(table: Mapping[str, Any]) -> str | None:
    """Return the first value that names code as recipes do, "package.module:Name"."""
    for key, value in table.items():
        if key != "name" and isinstance(value, str) and _CODE.fullmatch(value):
            return value
        if isinstance(value, Mapping):
            found = _foreign(cast(Mapping[str, Any], value))
            if found is not None:
                return found
    return None
