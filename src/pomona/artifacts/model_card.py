"""Model cards of what Pomona writes."""

from pathlib import Path

import yaml
from huggingface_hub import ModelCard, ModelCardData

from pomona.reconstruction.result import Reconstruction
from pomona.reconstruction.settings import ReconstructSettings


def card_head(model: str, folder: Path, *tags: str) -> str:
    """Return what a model card begins with for the Hub: base `model` and its licence, if `folder` names one."""
    told = ModelCardData(
        base_model=model,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[*tags, "pomona"],
        license=_licence(folder / "README.md"),
    )
    return f"---\n{told.to_yaml()}\n---\n"


def _licence(card: Path) -> str | None:
    if not card.is_file():
        return None
    try:
        return ModelCard.load(card, ignore_metadata_errors=True).data.to_dict().get("license")
    except (ValueError, OSError, yaml.YAMLError):  # somebody else's, and not ours to mend
        return None


def mixture_card(
    model: str, folder: Path, made: Reconstruction, settings: ReconstructSettings
) -> str:
    """Return the README.md of a checkpoint reconstructed from `model`, which lies in `folder`."""
    layers, experts, width = made.plan.keep_LEW.shape
    what, tag = f"A mixture of {experts} experts from {model}", "mixture-of-experts"
    if experts == 1:
        what, tag = f"{model}, pruned", "pruned"
    shared = f", {made.sizes.shared} more shared by all" if made.sizes.shared else ""
    groups = "\n".join(f"| {e} | {', '.join(g)} |" for e, g in enumerate(made.plan.groups))
    return f"""{card_head(model, folder, tag)}# {what}

Made by pruning the feed-forward layers of the dense base model once per group of domains and
assembling what is left as experts with a router (method: DIVE, arXiv 2506.09351). A stock checkpoint
({made.container}): `AutoModelForCausalLM.from_pretrained` opens it. {_retrained(settings)}
The base model's licence and limits apply.

- {layers} layers, {experts} experts of width {width} (dense: {made.plan.channels}){shared},
  {made.sizes.active} active per token
- {made.total_parameters:,} parameters, {made.active_parameters:,} active (dense: {made.dense_parameters:,})
- calibrated on {settings.windows} windows of {settings.length} tokens per domain, seed {settings.seed}
- score {settings.score!r}, planner {settings.planner!r},
  compensation {settings.compensation!r}, router {settings.router!r}

| expert | domains it was pruned for |
|---|---|
{groups}

`reconstruction/` holds the settings, the kept channels (plan.json) and, where domains were grouped by
affinity, that (affinity.json, affinity.svg) and their clusters (clusters.json).
"""


def _retrained(settings: ReconstructSettings) -> str:
    how = settings.retrain
    if how is None or not any(how.seen()):
        return "The experts have not been retrained."
    loss = "distilled from the dense model" if how.objective.loss == "distil" else "cross-entropy"
    router, experts = how.seen()
    return (
        f"Retrained on {router:,} tokens (router)\nand {experts:,} tokens (experts: "
        f"{how.experts.experts}), {loss}."
    )
