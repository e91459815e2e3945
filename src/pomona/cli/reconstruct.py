"""`pomona reconstruct`."""

from pathlib import Path
from typing import Annotated

import typer

from pomona.cli.options import Changes, Device, JsonLines, Quiet, Trackers

Model = Annotated[
    str | None, typer.Argument(metavar="MODEL", help="Dense checkpoint: folder or Hub id.")
]
Domains = Annotated[
    str | None,
    typer.Option(
        "--domains",
        help="Folder or glob, one .jsonl or .txt per domain; or one file.",
        metavar="DIR",
    ),
]
Out = Annotated[Path, typer.Option("--out", metavar="OUT", help="New folder for the checkpoint.")]
Experts = Annotated[
    int | None, typer.Option("--experts", help="Experts per layer; else the recipe's, or 8.")
]
Active = Annotated[
    int | None, typer.Option("--active", help="Experts per token; else the recipe's, or 2.")
]
Keep = Annotated[
    float | None, typer.Option("--keep", help="Share of FFN channels per expert; else 0.25.")
]
Recipe = Annotated[
    Path | None,
    typer.Option("--recipe", help="TOML recipe that says this and more.", metavar="FILE"),
]
Split = Annotated[
    bool | None,
    typer.Option(
        "--split-domains",
        help="Split domains where there are fewer than experts.",
        show_default=False,
    ),
]
Retrain = Annotated[
    int | None,
    typer.Option("--retrain", metavar="TOKENS", help="Retrain the experts on so many tokens."),
]
Text = Annotated[
    str | None,
    typer.Option("--text", metavar="DIR", help="What to retrain on; else the domains themselves."),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Only tell what would be made, and its cost.")
]
Offload = Annotated[
    bool,
    typer.Option("--offload", help="Read dense weights from disk, a layer's when it is used."),
]
AtOnce = Annotated[
    int | None,
    typer.Option(
        "--layers-at-once",
        metavar="N",
        help="Layers whose experts are held at once; 0: all. Else 4 with --offload, all without.",
        show_default=False,
    ),
]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of windows and fits.")]


def reconstruct(
    out: Out,
    model: Model = None,
    domains: Domains = None,
    experts: Experts = None,
    active: Active = None,
    keep: Keep = None,
    split_domains: Split = None,
    retrain: Retrain = None,
    text: Text = None,
    seed: Seed = None,
    recipe: Recipe = None,
    changes: Changes = None,
    device: Device = "auto",
    offload: Offload = False,
    layers_at_once: AtOnce = None,
    dry_run: DryRun = False,
    log: Trackers = None,
    quiet: Quiet = False,
    json: JsonLines = False,
) -> None:
    """Turn a dense model into a stock mixture of experts.

    MODEL is a folder or Hub id. Calibrates on every domain, groups the domains, prunes the FFN once
    per group, makes the pruned FFNs experts with a fitted router, and retrains them if asked.
    OUT opens with plain transformers.
    """
    from pomona.artifacts.tracking import tracked
    from pomona.cli.console import console
    from pomona.cli.screen import Screen
    from pomona.models.placement import Placement
    from pomona.pipelines.reconstruct import preview
    from pomona.pipelines.reconstruct import reconstruct as run_reconstruct
    from pomona.recipe import table_of
    from pomona.recipe.reconstruct import read_reconstruct_recipe

    given: dict[str, object] = {
        "model": model,
        "domains": domains,
        "experts": experts,
        "active": active,
    }
    given |= {"keep": keep, "split_domains": split_domains, "retrain": retrain, "text": text}
    source = read_reconstruct_recipe(recipe, {**given, "seed": seed}, changes or ())
    screen = Screen(quiet, json)
    placement = Placement(device, offload, layers_at_once)
    texts = source.load_domains()
    if dry_run:
        console.print(str(preview(source.model, list(texts), source.settings, placement)))
        return
    folder = out.with_name(f"{out.name}.log")
    told = {"model": source.model, **table_of(source.settings)}
    with (
        tracked(log or (), folder, told, screen.tell) as tracker,
        screen.progress(tracker) as progress,
    ):
        made = run_reconstruct(
            source.model,
            texts,
            out,
            source.settings,
            progress,
            source.load_text(),
            placement,
        )
    for line in (str(made), *source.settings.remarks(len(texts))):
        screen.tell(line)
    screen.tell(f"{out} opens with AutoModelForCausalLM.from_pretrained")
