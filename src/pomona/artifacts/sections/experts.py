"""Which experts are used and grafted, how routing drifts from the base, how open gates are."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from pomona.artifacts import curves, figures
from pomona.artifacts.finished import FinishedRun
from pomona.artifacts.page import figure, heading, matrix, note, number, table
from pomona.artifacts.rounds import (
    drift_by_client,
    drift_by_round,
    entropy_by_round,
    load_by_client,
    openness_by_round,
)
from pomona.artifacts.table import methods_of
from pomona.evaluation.experts import ExpertLoad

Rounds = Mapping[int, NDArray[np.float64]]


def experts(runs: Sequence[FinishedRun]) -> str:
    """Return load, entropy and drift of routing of every method, then grafts and gates."""
    methods = methods_of(runs)
    groups = {m: group for m, group in methods.items() if group[0].results["routing"]}
    drift = {m: found for m, group in methods.items() if (found := drift_by_round(group))}
    parts = [_use(groups, drift)] if groups else []
    if drift:
        plot = curves.layers_by_round(drift, "drift of expert load")
        told = (
            "How far the expert load of the model a client is served by is from the base's on the same "
            "rows: total variation, mean over clients and seeds. Thin: each MoE layer, the first dark. "
            "Thick: their mean. From metrics.jsonl."
        )
        parts.append(figure(plot, told, _layers(drift)))
    entropy = {
        m: found for m, group in methods.items() if len(found := entropy_by_round(group)) > 1
    }
    if entropy:
        plot = curves.layers_by_round(entropy, "entropy of expert load / log E")
        told = (
            "How even the expert load of the model a client is served by is, all clients' rows together, mean "
            "over seeds; round 0 is the base. Thin: each MoE layer, the first dark. Thick: their mean. From "
            "metrics.jsonl."
        )
        parts.append(figure(plot, told, _layers(entropy)))
    parts += [_load(group[0], "base") for group in list(groups.values())[:1]]
    parts += [_load(group[0], group[0].served) for group in groups.values()]
    parts += [_per_client(method, group) for method, group in groups.items()]
    parts += [_gates(group) for group in methods.values() if group[0].results["gate_openness"]]
    return "".join([heading("experts"), *parts]) if parts else ""


def _use(groups: Mapping[str, Sequence[FinishedRun]], drift: Mapping[str, Rounds]) -> str:
    body: list[list[str]] = []
    for method, group in groups.items():
        entropy = {
            model: np.mean([run.results["routing"][model]["entropy"] for run in group], axis=0)
            for model in ("base", group[0].served)
        }
        last = list(drift[method].values())[-1] if method in drift else None
        body.append(
            [
                method,
                *(number(float(e), 3) for h in entropy.values() for e in (h.mean(), h.min())),
                *(number(None if last is None else float(d(last)), 4) for d in (np.mean, np.max)),
            ]
        )
    header = [
        f"entropy, {model}, {what}" for model in ("base", "tuned") for what in ("mean", "least")
    ]
    told = (
        "Entropy of the expert load over log E, of all MoE layers and of the least even one: 1 is even. "
        "Drift in the last round: mean over layers and of the layer that drifted most."
    )
    return table(["method", *header, "drift, mean", "drift, most"], body) + note(told)


def _load(run: FinishedRun, model: str) -> str:
    load = run.results["routing"][model]["load"]
    layers, numbers = (
        [f"layer {i}" for i in range(len(load))],
        [str(e) for e in range(len(load[0]))],
    )
    plot = figures.heat_map(load, layers, numbers, "share of assignments")
    cells = matrix("layer", dict(zip(layers, load, strict=True)), numbers)
    return figure(plot, f"Expert load, {_whose(run, model)}. From results.json.", cells)


def _whose(run: FinishedRun, model: str) -> str:
    return "base" if model == "base" else f"{model} model of {run.method}, seed {run.seed}"


def _per_client(method: str, group: Sequence[FinishedRun]) -> str:
    """Return which experts each client's rows go to, and how far that is from the base, per layer."""
    run, drift = group[0], drift_by_client(group)
    parts: list[str] = []
    if load := load_by_client(run, run.served):
        told = f"Expert load of each client's test rows, {_whose(run, run.served)}. From metrics.jsonl."
        cells = [["client", "layer", "expert", "share"], *_shares(load)]
        parts.append(figure(figures.expert_load_map(load), told, cells))
    if drift:
        layers = [f"layer {i}" for i in range(len(next(iter(drift.values()))))]
        rows = {name: list(map(float, d)) for name, d in drift.items()}
        plot = figures.heat_map(list(rows.values()), list(rows), layers, "drift")
        told = (
            f"Drift of each client's expert load from the base's when last measured ({method}), mean over "
            "seeds. From metrics.jsonl."
        )
        parts.append(figure(plot, told, matrix("client", rows, layers)))
    return "".join(parts)


def _gates(group: Sequence[FinishedRun]) -> str:
    run = group[0]
    openness, chosen = run.results["gate_openness"], run.results["selection"]
    layers = [f"layer {i}" for i in range(len(next(iter(openness.values()))))]
    plot = figures.heat_map(list(openness.values()), list(openness), layers, "mean gate σ")
    parts = [
        table(
            [f"expert grafted ({run.method})", *layers],
            [[name, *map(str, own)] for name, own in chosen.items()],
        ),
        figure(
            plot,
            f"How open each client's gates are at the end ({run.method}, seed {run.seed}). "
            "From results.json.",
            matrix("client", openness, layers),
        ),
    ]
    rounds = openness_by_round(group)
    if rounds:
        rows = {f"round {round_}": list(map(float, g)) for round_, g in rounds.items()}
        plot = figures.heat_map(list(rows.values()), list(rows), layers, "mean gate σ")
        told = f"How open gates are over the rounds ({run.method}), mean over clients and seeds."
        cells = matrix("round", rows, layers)
        parts.append(figure(plot, f"{told} From metrics.jsonl.", cells))
    return "".join(parts)


def _layers(methods: Mapping[str, Rounds]) -> list[list[object]]:
    """Return what a plot of layers over the rounds shows."""
    layers = len(next(iter(next(iter(methods.values())).values())))
    head: list[object] = ["method", "round", *(f"layer {i}" for i in range(layers))]
    return [
        head,
        *(
            [method, round_, *map(float, values)]
            for method, rounds in methods.items()
            for round_, values in rounds.items()
        ),
    ]


def _shares(load: Mapping[str, ExpertLoad]) -> Iterator[list[object]]:
    for client, own in load.items():
        for layer in range(len(own.num_experts)):
            for expert, share in enumerate(own.layer(layer)):
                yield [client, layer, expert, share]
