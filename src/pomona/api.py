"""The pipelines as functions of the package: `pomona.reconstruct`, `federate`, `evaluate`, `load_personal`.

Each takes what the command of the same name takes, and returns something with types.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pomona.artifacts.finished import FinishedRun, load_run
from pomona.artifacts.personal import PersonalModel, load_personal
from pomona.artifacts.run import RunDirectory
from pomona.federation.settings import FederateSettings
from pomona.models.placement import Placement
from pomona.pipelines import evaluate as evaluation
from pomona.pipelines.federate import federate as run_federation
from pomona.pipelines.reconstruct import reconstruct as run_reconstruct
from pomona.progress import Progress, Tell, silent, unheard
from pomona.recipe import dump, read_recipe
from pomona.recipe.reconstruct import read_reconstruct_recipe
from pomona.reconstruction.result import Reconstruction

__all__ = ["evaluate", "federate", "load_personal", "reconstruct"]

_HERE = Placement()


def reconstruct(
    model: str | Path,
    domains: str | Path,
    out: str | Path,
    recipe: str | Path | None = None,
    progress: Progress = silent,
    placement: Placement = _HERE,
    **settings: object,
) -> Reconstruction:
    """Make a mixture of experts of a dense checkpoint, as `pomona reconstruct` does.

    Args:
        model: Folder or Hub id of the dense model.
        domains: Folder with a text file per domain, or whatever `--domains` takes.
        out: New folder for the mixture.
        recipe: TOML file with everything else; without one, `settings` and defaults.
        progress: Told the stages.
        placement: Where the weights lie meanwhile.
        settings: `experts`, `active`, `keep`, `split_domains`, `retrain`, `text`, `seed`.

    Returns:
        What was made: folder, container, sizes, plan, parameters.

    Raises:
        PomonaError: whatever is wrong with the model, the domains, the settings or the disk.
    """
    given = {"model": str(model), "domains": str(domains), **settings}
    source = read_reconstruct_recipe(None if recipe is None else Path(recipe), given)
    texts, text = source.load_domains(), source.load_text()
    return run_reconstruct(
        source.model, texts, Path(out), source.settings, progress, text, placement
    )


def federate(
    recipe: str | Path | FederateSettings,
    out: str | Path,
    model: str | Path | None = None,
    seed: int | None = None,
    progress: Progress = silent,
    tell: Tell = unheard,
    device: str = "auto",
) -> FinishedRun:
    """Tune a model across clients, as `pomona federate` does; a run that was interrupted goes on.

    Args:
        recipe: TOML file, or the settings that one would be.
        out: Run folder, new or to go on.
        model: In the place of the recipe's; folder or Hub id.
        seed: In the place of the recipe's.
        progress: Told the stages.
        tell: Told sentences that a user should read at once.
        device: "auto", "cpu", "cuda" or "cuda:1".

    Returns:
        The finished run: results, answers and metrics, as lines; its folder has the parts.

    Raises:
        PomonaError: whatever is wrong with the recipe, the model, the rows or the disk.
    """
    settings = recipe
    if not isinstance(settings, FederateSettings):
        named = None if model is None else str(_absolute(model))
        settings = read_recipe(Path(str(recipe)), FederateSettings, {"model": named, "seed": seed})
    about: dict[str, Any] = {
        "command": ["python", *sys.argv],
        "method": settings.name,
        "seed": settings.seed,
    }
    with RunDirectory.open(Path(out), dump(settings), about) as run:
        run_federation(settings, run, progress, tell, device)
    return load_run(Path(out))


def evaluate(
    model: str | Path,
    rows: str | Path | None = None,
    text: str | Path | None = None,
    adapter: str | Path | None = None,
    graft: str | Path | None = None,
    personal: str | Path | None = None,
    device: str = "auto",
    **options: Any,
) -> Mapping[str, Mapping[str, float]]:
    """Measure a model, or a client's personal model, on rows or on text, as `pomona evaluate` does.

    Args:
        model: Folder or Hub id.
        rows: Instruction rows: loss and perplexity of answers, ROUGE-L, exact match.
        text: Text file or folder of domains: loss and perplexity of windows.
        adapter: Folder of a PEFT adapter to put on.
        graft: Folder of a client's graft to put on.
        personal: Folder of a client's private LoRA to put on.
        device: "auto", "cpu", "cuda" or "cuda:1".
        options: Of rows `template`, `limit`, `length`, `new_tokens`; of text `limit`, `lengths` (one).

    Returns:
        Figures by file or domain.

    Raises:
        PomonaError: whatever is wrong with them.
        TypeError: neither or both of rows and text.
    """
    if (rows is None) == (text is None):
        raise TypeError("give rows or text, one of them")
    folders = [None if path is None else Path(path) for path in (adapter, graft, personal)]
    own = PersonalModel(str(model), folders[0], folders[1], folders[2], device)
    if rows is not None:
        return evaluation.on_rows(own, Path(rows), **options)
    (found,) = evaluation.on_text(own, str(text), **options).values()
    return found.figures


def _absolute(model: str | Path) -> str | Path:
    return Path(model).resolve() if Path(model).exists() else model
