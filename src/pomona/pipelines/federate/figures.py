"""What a round has measured, in the few figures that one wants to watch."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from pomona.models.placement import memory_gib
from pomona.progress import Figures


def round_figures(metrics: Sequence[Mapping[str, Any]], tokens_per_second: float) -> Figures:
    """Return means over clients of a round's losses, what it cost, how fast it went.

    `loss` is that of training, nats per answer token; the others are there where they were measured. A rate of
    0 is one that is not known: sites do not tell how many tokens they have.
    """
    found = {"loss": _mean(line["losses"] for line in metrics if line["model"] == "training")}
    for model in ("shared", "personal", "held back"):
        losses = [line["loss"] for line in metrics if line["model"] == model and "loss" in line]
        found[f"{model.replace(' ', '_')}_loss"] = fmean(losses) if losses else None
    for way, name in (("sent", "megabytes_sent"), ("received", "megabytes_received")):
        told = [line[way] for line in metrics if line["model"] == "communication"]
        found[name] = sum(sum(own.values()) for own in told) / 1e6
    spent = [line["epsilon"] for line in metrics if line["model"] in ("privacy", "dp-sgd")]
    found["epsilon"] = max(spent) if spent else None
    found["tokens_per_second"] = tokens_per_second or None
    found["memory_gib"] = memory_gib()
    return {name: value for name, value in found.items() if value is not None}


def _mean(losses: Iterable[Sequence[float]]) -> float | None:
    means = [fmean(own) for own in losses if own]
    return fmean(means) if means else None
