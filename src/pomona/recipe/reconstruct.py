"""What `pomona reconstruct` was asked for: a recipe, options, or both."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from pomona.data.texts import read_domains
from pomona.errors import PomonaError
from pomona.pipelines.reconstruct import ReconstructSettings
from pomona.recipe.build import build
from pomona.recipe.changes import changed
from pomona.recipe.read import read_table


@dataclass(frozen=True)
class ReconstructRecipe:
    """A dense model, its domains and how to reconstruct.

    Raises `PomonaError` for a text that nothing is retrained on.

    Attributes:
        model: Dense checkpoint: folder or Hub id.
        domains: Folder or glob with a text file per domain, or one file.
        text: What to retrain on, in the same form; without it the domains themselves.
        settings: Everything else.
    """

    model: str = field(metadata={"path": True})
    domains: Path
    text: Path | None = None
    settings: ReconstructSettings = field(default_factory=ReconstructSettings)

    def __post_init__(self) -> None:
        if self.text is not None and self.settings.retrain is None:
            raise PomonaError(
                f"text {self.text} is what to retrain on, and nothing is retrained; add a table "
                "settings.retrain (--retrain TOKENS) or leave text (--text) out"
            )

    def load_domains(self) -> dict[str, list[str]]:
        """Read the domains' documents."""
        return read_domains(self.domains)

    def load_text(self) -> list[str] | None:
        """Read the documents to retrain on, or None for the domains' own."""
        if self.text is None:
            return None
        return [document for own in read_domains(self.text).values() for document in own]


def read_reconstruct_recipe(
    path: Path | None, given: Mapping[str, Any], changes: Sequence[str] = ()
) -> ReconstructRecipe:
    """Join a recipe with options; options win. Raises `PomonaError` for what is missing.

    `changes` are those of `--set`, to the recipe.
    """
    table = changed(read_table(path) if path else {}, changes)
    folder = path.parent.resolve() if path else Path.cwd()
    options = {key: value for key, value in given.items() if value is not None}
    source = {k: options.pop(k) for k in ("model", "domains", "text") if k in options}
    tokens = options.pop("retrain", None)
    if "model" in source and Path(source["model"]).exists():
        source["model"] = str(Path(source["model"]).resolve())
    for key in ("domains", "text"):
        if key in source:
            source[key] = str(Path(source[key]).absolute())
    table |= source
    where = str(path) if path else "command line"
    settings = table.get("settings", {})
    if not isinstance(settings, dict):
        raise PomonaError(f"{where}: settings is {settings!r}; it should be a table")
    table["settings"] = {**settings, **options}
    if tokens is not None:
        table["settings"]["retrain"] = _with_tokens(settings.get("retrain", {}), tokens)
    for key, option in (("model", "MODEL"), ("domains", "--domains DIR")):
        if key not in table:
            raise PomonaError(f"{where}: {key} is missing; give {option} or a recipe that names it")
    return build(ReconstructRecipe, table, folder, where)


def _with_tokens(retrain: Any, tokens: int) -> Any:
    """Set the second stage's budget; the rest stays as the recipe has it, its mistakes too."""
    if not isinstance(retrain, dict):
        return retrain
    how = cast(dict[str, Any], retrain)
    experts = how.get("experts", {})
    if not isinstance(experts, dict):
        return how
    return {**how, "experts": {**cast(dict[str, Any], experts), "tokens": tokens}}
