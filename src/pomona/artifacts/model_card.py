"""Model cards of what Pomona writes."""

from typing import Any


def mixture_card(model: str, made: Any, settings: Any) -> str:
    """Return the README.md of a reconstructed checkpoint."""
    layers, experts, width = made.plan.keep_LEW.shape
    groups = "\n".join(f"| {e} | {', '.join(g)} |" for e, g in enumerate(made.plan.groups))
    return f"""---
base_model: {model}
library_name: transformers
pipeline_tag: text-generation
tags: [mixture-of-experts, pomona]
---
# A mixture of {experts} experts from {model}

Made by pruning the feed-forward layers of the dense base model once per group of domains and
assembling what is left as experts with a router (method: DIVE, arXiv 2506.09351). A stock Mixtral
checkpoint: `AutoModelForCausalLM.from_pretrained` opens it. The experts have not been retrained.
The base model's licence and limits apply.

- {layers} layers, {experts} experts of width {width} (dense: {made.plan.channels}),
  {settings.active} active per token
- {made.total_parameters:,} parameters, {made.active_parameters:,} active (dense: {made.dense_parameters:,})
- calibrated on {settings.windows} windows of {settings.length} tokens per domain, seed {settings.seed}
- score {settings.score!r}, compensation {settings.compensation!r}, router {settings.router!r}

| expert | domains it was pruned for |
|---|---|
{groups}

`reconstruction/` holds the kept channels (plan.json), the affinity of the domains (affinity.json) and
their clusters (clusters.json).
"""
