"""What was forgotten: the loss of held-out text, the untuned base beside every model."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pomona.artifacts.finished import FinishedRun
from pomona.artifacts.page import heading, note, number, span, table
from pomona.artifacts.sections.paired import paired
from pomona.artifacts.table import methods_of
from pomona.evaluation.intervals import Comparison, Ratio, paired_bootstrap
from pomona.evaluation.significance import holm

Lines = Sequence[Mapping[str, Any]]


def forgetting(runs: Sequence[FinishedRun], baseline: str | None) -> str:
    """Return a row per method and model, with what it lost against the base on the same windows."""
    groups = {
        method: lines
        for method, group in methods_of(runs).items()
        if (lines := [line for run in group for line in run.forgetting])
    }
    if not groups:
        return ""
    domains = list(dict.fromkeys(line["domain"] for own in groups.values() for line in own))
    first = next(iter(groups.values()))
    body = [_row("base", first, "base", domains, None, None)]
    found = [
        (f"{method}, {model}", lines, model, compared)
        for method, lines in groups.items()
        for model in ("shared", "personal")
        if any(line["model"] == model for line in lines)
        and (compared := _compare(lines, model, lines, "base"))
    ]
    corrected = holm([compared.p_value for *_, compared in found])
    for (name, lines, model, compared), p in zip(found, corrected, strict=True):
        body.append(_row(name, lines, model, domains, compared, p))
    header = ["model", *domains, "mean", "worst client", "− base", "95 %", "p, Holm"]
    told = (
        "Nats per token; personal models: the mean over clients. Paired bootstrap over the same windows, "
        "domains kept apart; Holm: corrected for all rows. From forgetting.jsonl."
    )
    served = {method: group[0].served for method, group in methods_of(runs).items()}
    return (
        heading("forgetting: loss of held-out text")
        + table(header, body)
        + note(told)
        + _against(groups, served, baseline)
    )


def _row(
    name: str,
    lines: Lines,
    model: str,
    domains: Sequence[str],
    compared: Comparison | None,
    p: float | None,
) -> list[str]:
    rows = _windows([line for line in lines if line["model"] == model])
    losses = {domain: float(top.sum() / bottom.sum()) for domain, (top, bottom) in rows.items()}
    return [
        name,
        *(number(losses.get(domain), 3) for domain in domains),
        number(float(np.mean(list(losses.values()))), 3),
        number(_worst(lines) if model == "personal" else None, 3),
        number(compared.difference.mean if compared else None, 3, "+"),
        span(compared.difference.low, compared.difference.high, 3, "+") if compared else "–",
        number(p, 4),
    ]


def _worst(lines: Lines) -> float:
    """Return the mean loss over domains of the client whose model forgot most."""
    own = [line for line in lines if line["model"] == "personal"]
    clients = {line["client"] for line in own}
    rows = [_windows([line for line in own if line["client"] == client]) for client in clients]
    return max(float(np.mean([t.sum() / b.sum() for t, b in each.values()])) for each in rows)


def _windows(lines: Lines) -> dict[str, Ratio]:
    """Return every domain's windows, each the mean over clients and seeds."""
    found: dict[str, dict[int, list[tuple[float, float]]]] = {}
    for line in lines:
        own = found.setdefault(line["domain"], {}).setdefault(line["window"], [])
        own.append((line["nats"], line["tokens"]))
    means = {
        domain: np.array([np.mean(own, axis=0) for _, own in sorted(windows.items())])
        for domain, windows in found.items()
    }
    return {domain: (both[:, 0], both[:, 1]) for domain, both in means.items()}


def _compare(a: Lines, first: str, b: Lines, second: str) -> Comparison | None:
    """Compare two models on the same windows; None where the windows are others."""
    ours, theirs = (
        _windows([line for line in lines if line["model"] == model])
        for lines, model in ((a, first), (b, second))
    )
    same = ours.keys() == theirs.keys() and all(
        np.array_equal(ours[domain][1], theirs[domain][1]) for domain in ours
    )
    if not same:
        return None
    return paired_bootstrap([ours[d] for d in ours], [theirs[d] for d in ours])


def _against(groups: Mapping[str, Lines], served: Mapping[str, str], baseline: str | None) -> str:
    if baseline is None or baseline not in groups:
        return ""
    found = [
        (f"{method} − {baseline}", compared)
        for method, lines in groups.items()
        if method != baseline
        and (compared := _compare(lines, served[method], groups[baseline], served[baseline]))
    ]
    return paired(found, 3)
