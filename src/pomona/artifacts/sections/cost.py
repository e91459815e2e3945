"""What methods cost: bytes between server and clients, FLOPs and time per token."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from pomona.artifacts import figures
from pomona.artifacts.finished import FinishedRun
from pomona.artifacts.page import figure, heading, note, number, table
from pomona.artifacts.table import methods_of


def cost(runs: Sequence[FinishedRun]) -> str:
    """Return the tables of communication and, where they were counted, of FLOPs and speed."""
    first = [group[0] for group in methods_of(runs).values()]
    return _communication(runs) + _per_client(first) + _flops(first) + _speed(runs)


def _communication(runs: Sequence[FinishedRun]) -> str:
    body: list[list[str]] = []
    for run in runs:
        lines = _lines(run)
        ways = ("sent", "received")
        both = (sum(m[f"{way}_bytes"] for m in lines) if lines else None for way in ways)
        each = _per_client_and_round(run, lines)
        body.append(
            [
                run.method,
                str(run.seed),
                *map(_megabytes, both),
                _megabytes(each),
                *_ratios(run, each),
            ]
        )
    header = ["method", "seed", "sent to clients, MB", "received, MB", "per client and round, MB"]
    told = (
        "Bytes of the messages as they are serialised, all rounds; per client and round, the mean of both "
        "ways, and as a share of what that message would be if everything were aggregated: all parameters "
        "of the model, or LoRA of the same rank on the shared projections and every expert (both from "
        "their shapes). From metrics.jsonl and results.json."
    )
    shares = ["of all parameters", "of LoRA everywhere"]
    return heading("communication") + table([*header, *shares], body) + note(told)


def _per_client_and_round(run: FinishedRun, lines: Sequence[Any]) -> float | None:
    """Return the mean message of those who took part in rounds; who is new then sends nothing."""
    new = run.newcomers
    both = [
        (m["sent"][name] + m["received"].get(name, 0)) / 2
        for m in lines
        for name in m.get("sent", ())
        if name not in new
    ]
    return sum(both) / len(both) if both else None


def _ratios(run: FinishedRun, each: float | None) -> list[str]:
    counted = run.results.get("cost")
    if each is None or not counted:
        return ["–", "–"]
    return [
        f"{100 * each / counted['bytes'][what]:.3g} %"
        for what in ("all_parameters", "lora_everywhere")
    ]


def _per_client(runs: Sequence[FinishedRun]) -> str:
    counted = [run for run in runs if any("sent" in m for m in _lines(run))]
    if not counted:
        return ""
    clients = list(dict.fromkeys(name for run in counted for name in _named(run)))
    body = [
        [f"{run.method}, {way}", *(_megabytes(_total(run, way, name)) for name in clients)]
        for run in counted
        for way in ("sent", "received")
    ]
    told = "MB of all rounds, the first seed of each method. From metrics.jsonl."
    parts = [table(["to and from", *clients], body), note(told)]
    return "".join([*parts, *map(_by_round, counted)])


def _named(run: FinishedRun) -> list[str]:
    """Return everybody who was sent anything: the clients in their order, or who trains for them (pooled)."""
    told = dict.fromkeys(name for m in _lines(run) for name in m.get("sent", ()))
    clients = [name for name in run.results["base"]["clients"] if name in told]
    return clients or list(told)


def _total(run: FinishedRun, way: str, client: str) -> float | None:
    own = [m[way][client] for m in _lines(run) if client in m.get(way, ())]
    return sum(own) if own else None


def _by_round(run: FinishedRun) -> str:
    """Draw how much went to and from every client in each round; nothing where nothing was sent."""
    lines = [m for m in _lines(run) if "sent" in m]
    if not any(m["sent_bytes"] or m["received_bytes"] for m in lines):
        return ""
    clients = _named(run)
    messages = {
        told: [[m[way].get(c, np.nan) / 1000 for m in lines] for c in clients]
        for way, told in (("sent", "sent to the client"), ("received", "received from it"))
    }
    plot = figures.message_map(messages, clients, [m["round"] for m in lines])
    told = (
        f"Messages of {run.method}, seed {run.seed}, by round: blank where a client was not in it, 0 where it "
        "sent nothing. From metrics.jsonl."
    )
    head: list[object] = ["way", "client", *(f"round {m['round']}, kB" for m in lines)]
    rows = [
        [way, client, *("" if np.isnan(v) else v for v in own)]
        for way, found in messages.items()
        for client, own in zip(clients, found, strict=True)
    ]
    return figure(plot, told, [head, *rows])


def _flops(runs: Sequence[FinishedRun]) -> str:
    counted = [run for run in runs if run.results.get("cost")]
    body: list[list[str]] = []
    for run in counted:
        flops = run.results["cost"]["flops_per_token"]
        base, more = flops["base"], flops["adapter"] + flops["graft"]
        cells = (base, flops["adapter"], flops["graft"], base + more)
        body.append(
            [run.method, *(number(v / 1e6, 3) for v in cells), number(100 * more / base, 2, "+")]
        )
    if not body:
        return ""
    header = ["method", "base, MFLOPs per token", "adapter", "graft", "together", "more, %"]
    told = (
        "Matrix products of one token, counted from shapes, with the experts per token that were "
        "measured; attention's scores are not in it. Unmerged, as clients are served while training. "
        "From results.json."
    )
    return heading("FLOPs per token") + table(header, body) + note(told)


def _speed(runs: Sequence[FinishedRun]) -> str:
    timed = [(run, run.speed) for run in runs if run.speed is not None]
    body: list[list[str]] = []
    for run, file in timed:
        for name, speed in file.speeds.items():
            who = "base" if name == "base" else file.client
            rates = (speed.prefill, speed.decode, 1000 / speed.decode)
            size = [str(speed.prompt), str(speed.new_tokens)]
            body.append([run.method, str(run.seed), who, *(number(r, 1) for r in rates), *size])
    if not body:
        return ""
    header = ["method", "seed", "model", "prompt tokens/s", "new tokens/s", "ms per new token"]
    told = (
        "Greedy generation, batch of one; the base and one client's model in turn, the median repeat. "
        "From speed.json."
    )
    sizes = ["prompt", "new tokens"]
    return heading("speed") + table([*header, *sizes], body) + note(told)


def _lines(run: FinishedRun) -> list[Any]:
    return [m for m in run.metrics if m["model"] == "communication"]


def _megabytes(size: float | None) -> str:
    return "–" if size is None else f"{size / 1e6:.4g}"
