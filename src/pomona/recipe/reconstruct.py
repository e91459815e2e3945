"""What `pomona reconstruct` was asked for: a recipe, options, or both."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pomona.data.texts import read_domains
from pomona.errors import PomonaError
from pomona.recipe.build import build
from pomona.recipe.read import read_table
from pomona.reconstruct import ReconstructSettings


@dataclass(frozen=True)
class ReconstructRecipe:
    """A dense model, its domains (folder or glob) and how to reconstruct."""

    model: str = field(metadata={"path": True})
    domains: Path
    settings: ReconstructSettings = field(default_factory=ReconstructSettings)

    def load_domains(self) -> dict[str, list[str]]:
        """Read the domains' documents."""
        return read_domains(self.domains)


def read_reconstruct_recipe(path: Path | None, given: Mapping[str, Any]) -> ReconstructRecipe:
    """Join a recipe with options; options win. Raises `PomonaError` for what is missing."""
    table = dict(read_table(path)) if path else {}
    folder = path.parent.resolve() if path else Path.cwd()
    options = {key: value for key, value in given.items() if value is not None}
    source = {k: options.pop(k) for k in ("model", "domains") if k in options}
    if "model" in source and Path(source["model"]).exists():
        source["model"] = str(Path(source["model"]).resolve())
    if "domains" in source:
        source["domains"] = str(Path(source["domains"]).absolute())
    table |= source
    where = str(path) if path else "command line"
    settings = table.get("settings", {})
    if not isinstance(settings, dict):
        raise PomonaError(f"{where}: settings is {settings!r}; it should be a table")
    table["settings"] = {**settings, **options}
    for key, option in (("model", "MODEL"), ("domains", "--domains DIR")):
        if key not in table:
            raise PomonaError(f"{where}: {key} is missing; give {option} or a recipe that names it")
    return build(ReconstructRecipe, table, folder, where)
