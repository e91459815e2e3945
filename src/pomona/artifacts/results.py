"""From rows of a final evaluation to the numbers people compare."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pomona.evaluation.experts import expert_load
from pomona.evaluation.loss import perplexity
from pomona.evaluation.speed import Speed
from pomona.federation.holdings import Holdings
from pomona.files import damaged, read_as, read_object
from pomona.models.experts import ExpertSite

FORGETTING = "forgetting.jsonl"
TASKS = "tasks.jsonl"
SPEED = "speed.json"
MODELS = ("base", "shared", "personal")


@dataclass(frozen=True)
class _Figures:
    loss: float
    perplexity: float
    rouge_l: float | None
    exact_match: float | None = None


@dataclass(frozen=True)
class _Model:
    mean: _Figures
    clients: dict[str, _Figures]


@dataclass(frozen=True)
class _Routing:
    load: list[list[float]]
    entropy: list[float]
    experts: list[int] = field(default_factory=list[int])


@dataclass(frozen=True)
class _Bytes:
    all_parameters: int
    lora_everywhere: int


@dataclass(frozen=True)
class _Flops:
    base: float
    adapter: float
    graft: float


@dataclass(frozen=True)
class _Cost:
    bytes: _Bytes
    flops_per_token: _Flops


@dataclass(frozen=True)
class SpeedFile:
    """speed.json: how fast the base and, beside it, one client's model generate."""

    client: str
    speeds: dict[str, Speed]


@dataclass(frozen=True)
class _Results:
    """results.json, as `assemble_results` makes it and a run adds the digests of its files."""

    base: _Model
    shared: _Model | None
    personal: _Model | None
    selection: dict[str, list[int | list[int]]] | None
    gate_openness: dict[str, list[float]] | None
    routing: dict[str, _Routing]
    data: Holdings
    files: dict[str, str]
    cost: _Cost | None = None


def read_results(path: Path) -> dict[str, Any]:
    """Read results.json; raises `PomonaError` naming it and the first thing in it that is wrong."""
    found = read_as(path, _Results)
    served = found.personal if found.selection else found.personal or found.shared
    if served is None or not served.clients or served.clients.keys() != found.base.clients.keys():
        raise damaged(path, "it has no figures of every client's model")
    if (found.selection or {}).keys() != (found.gate_openness or {}).keys():
        raise damaged(path, "selection and gate_openness are not of the same clients")
    if not found.data.consistent() or found.data.train.keys() != found.base.clients.keys():
        raise damaged(path, "data does not count every client's rows of every category")
    if not all(routing.load for routing in found.routing.values()):
        raise damaged(path, "routing has no layers")
    return read_object(path)


def assemble_results(
    answers: Sequence[Mapping[str, Any]],
    routing: Sequence[Mapping[str, Any]],
    sites: Sequence[ExpertSite],
    experts: Mapping[str, Sequence[Sequence[int]]],
    cost: Mapping[str, Any],
) -> dict[str, Any]:
    """Return results.json: per model the clients' figures and their mean; selection, gates, routing.

    `experts` [sites][grafts] are what every client's grafts grew from, none without a graft; `cost` is what
    the method costs (`federation.cost`). A model that a method does not have (the shared one of local-only)
    is null.
    """
    return {
        **{model: of_model([a for a in answers if a["model"] == model]) for model in MODELS},
        "selection": {n: _selection(own) for n, own in experts.items() if own} or None,
        "gate_openness": {line["client"]: line["openness"] for line in routing if line["openness"]}
        or None,
        "routing": {
            model: pooled_routing(
                [line["counts"] for line in routing if line["model"] == model],
                [site.num_experts for site in sites],
            )
            for model in MODELS
            if any(line["model"] == model for line in routing)
        },
        "cost": cost,
    }


def of_model(answers: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return every client's figures and their mean, of one model's answers; None without any."""
    if not answers:
        return None
    by_client: dict[str, list[Mapping[str, Any]]] = {}
    for answer in answers:
        by_client.setdefault(answer["client"], []).append(answer)
    clients = {name: _of_client(own) for name, own in by_client.items()}
    keys = ("loss", "perplexity", "rouge_l", "exact_match")
    return {
        "mean": {key: _mean([client[key] for client in clients.values()]) for key in keys},
        "clients": clients,
    }


def _of_client(answers: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    loss = sum(a["nats"] for a in answers) / sum(a["tokens"] for a in answers)
    said = {key: _mean([a[key] for a in answers]) for key in ("rouge_l", "exact_match")}
    return {"loss": loss, "perplexity": perplexity(loss), **said}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def pooled_routing(
    counts_CLE: Sequence[Sequence[Sequence[int]]], experts_L: Sequence[int]
) -> dict[str, Any]:
    """Pool clients' assignments: the share of every expert and the entropy of every layer."""
    load = expert_load(torch.tensor(counts_CLE).sum(0), experts_L)
    return {
        "load": load.share_LE.tolist(),
        "entropy": load.entropy_L.tolist(),
        "experts": list(experts_L),
    }


def _selection(experts: Sequence[Sequence[int]]) -> list[int | list[int]]:
    """Return the expert of every layer, or its experts where there are several grafts."""
    return [own[0] if len(own) == 1 else list(own) for own in experts]
