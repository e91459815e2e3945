"""One self-contained HTML page: finished runs side by side, no request to anywhere."""

import html
import shlex
from collections.abc import Sequence
from pathlib import Path

from pydantic import TypeAdapter

import pomona
from pomona.artifacts import figures
from pomona.artifacts.holdings import holdings_map
from pomona.artifacts.table import (
    BASE,
    MEASURES,
    FinishedRun,
    compare,
    load_runs,
    pairwise,
)
from pomona.data.duplicates import told
from pomona.errors import PomonaError
from pomona.federation.holdings import Holdings
from pomona.files import write_text

_STYLE = """
:root{color-scheme:light dark;--ink:#1a202c;--soft:#4a5568;--line:#cbd5e0;--page:#fff;--plot:#fff}
@media(prefers-color-scheme:dark){
:root{--ink:#edf2f7;--soft:#a0aec0;--line:#4a5568;--page:#171923;--plot:#f7fafc}}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--page);max-width:60rem;
margin:auto;padding:1rem}
h1{margin:.2em 0}h2{margin-top:2em}.soft,figcaption{color:var(--soft);font-size:.9rem}
.scroll{overflow-x:auto;margin-block:1rem}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .7rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left}figure{margin:1em 0}
figure svg{max-width:100%;height:auto;background:var(--plot);border-radius:6px}
code,pre{font-family:ui-monospace,monospace;font-size:.85rem;white-space:pre-wrap;overflow-wrap:anywhere}
@media print{body{max-width:none}}
"""


def write_report(paths: Sequence[Path], out: Path) -> None:
    """Compare finished run directories on one page.

    Raises `PomonaError` when a directory is not a finished run or the runs measured other clients.
    """
    runs = load_runs(paths)
    clients = {tuple(sorted(run.results["base"]["clients"])) for run in runs}
    if len(clients) > 1:
        raise PomonaError(
            f"{paths[0]} and the other runs have different clients; report runs of one federation"
        )
    write_text(out, page(runs))


def page(runs: Sequence[FinishedRun]) -> str:
    """Return the page's HTML."""
    sections = [
        _summary(runs),
        *(_measure(runs, measure) for measure in MEASURES),
        _data(runs),
        _convergence(runs),
        _experts(runs),
        _communication(runs),
        _privacy(runs),
        _origin(runs),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>Pomona report</title><style>{_STYLE}</style></head><body>"
        f"<h1>Pomona report</h1>{''.join(sections)}</body></html>\n"
    )


def _summary(runs: Sequence[FinishedRun]) -> str:
    base, *methods = compare(runs, "loss")
    best = min(methods, key=lambda line: line.mean.mean)
    return (
        f"<p>{len(base.clients)} clients, {len(runs)} runs. Lowest mean answer loss: "
        f"<strong>{_text(best.method)}</strong>, {best.mean.mean:.3f} nats per token "
        f"(95 % interval {best.mean.low:.3f} to {best.mean.high:.3f}); the untuned base has "
        f"{base.mean.mean:.3f}.</p>"
    )


def _measure(runs: Sequence[FinishedRun], measure: str) -> str:
    lines = compare(runs, measure)
    digits = 3 if measure == "loss" else 1
    clients = list(lines[0].clients)
    header = ["method", *clients, "mean", "95 % interval", "seeds"]
    body = [
        [
            line.method,
            *(f"{line.clients[name]:.{digits}f}" for name in clients),
            f"{line.mean.mean:.{digits}f}",
            f"{line.mean.low:.{digits}f} – {line.mean.high:.{digits}f}",
            "–" if line.method == BASE else ", ".join(map(str, line.seeds)),
        ]
        for line in lines
    ]
    plot = figures.per_client(lines, MEASURES[measure].partition(" (")[0])
    return (
        f"<h2>{_text(_sentence(MEASURES[measure]))}</h2>{_table(header, body)}"
        f"{_differences(runs, measure, digits)}{_figure(plot, 'Per client. From answers.jsonl.')}"
    )


def _differences(runs: Sequence[FinishedRun], measure: str, digits: int) -> str:
    pairs = pairwise(runs, measure)
    if not pairs:
        return ""
    header = ["difference of means", "value", "95 % interval", "p"]
    body = [
        [
            f"{first} − {second}",
            f"{c.difference.mean:+.{digits}f}",
            f"{c.difference.low:+.{digits}f} – {c.difference.high:+.{digits}f}",
            f"{c.p_value:.3f}",
        ]
        for first, second, c in pairs
    ]
    note = '<p class="soft">Paired bootstrap over the same test rows, clients kept apart.</p>'
    return _table(header, body) + note


def _data(runs: Sequence[FinishedRun]) -> str:
    """Who holds what, once for all runs with the same rows, and what is both trained and tested on."""
    groups: list[tuple[Holdings, list[FinishedRun]]] = []
    for run in runs:
        held = TypeAdapter(Holdings).validate_python(run.results["data"])
        known = next((group for other, group in groups if other == held), None)
        if known is None:
            groups.append((held, [run]))
        else:
            known.append(run)
    return "<h2>Who holds what</h2>" + "".join(
        _held(held, "" if len(groups) == 1 else _named(own)) for held, own in groups
    )


def _held(held: Holdings, whose: str) -> str:
    found = held.duplicates
    body = [
        [name, *map(str, (sum(held.train[name]), own.test, own.same, own.own, own.prompt))]
        for name, own in found.clients.items()
    ]
    header = [
        "client",
        "train rows",
        "test rows",
        "trained on by anyone",
        "by itself",
        "prompt only",
    ]
    caption = f"Train rows per client and category{whose}. From results.json."
    return (
        _figure(holdings_map(held), caption)
        + _table(header, body)
        + f'<p class="soft">{_text(_sentence(told(found)))}.</p>'
    )


def _named(runs: Sequence[FinishedRun]) -> str:
    return " (" + ", ".join(f"{run.method}, seed {run.seed}" for run in runs) + ")"


def _convergence(runs: Sequence[FinishedRun]) -> str:
    plot = figures.convergence(runs)
    return f"<h2>Convergence</h2>{_figure(plot, 'Mean over clients. From metrics.jsonl.')}"


def _experts(runs: Sequence[FinishedRun]) -> str:
    grafted = next((run for run in runs if run.results["gate_openness"]), None)
    routed = grafted or next((run for run in runs if run.results["routing"]), None)
    if routed is None:
        return ""
    parts = [f"<h2>Experts ({_text(routed.method)})</h2>"]
    if grafted is not None:
        openness, chosen = grafted.results["gate_openness"], grafted.results["selection"]
        layers = [f"layer {i}" for i in range(len(next(iter(openness.values()))))]
        parts.append(
            _table(["expert grafted", *layers], [[n, *map(str, e)] for n, e in chosen.items()])
        )
        plot = figures.heat_map(list(openness.values()), list(openness), layers, "mean gate σ")
        parts.append(_figure(plot, "How open each client's gates are. From results.json."))
    for model, routing in routed.results["routing"].items():
        experts = [str(e) for e in range(len(routing["load"][0]))]
        layers = [f"layer {i}" for i in range(len(routing["load"]))]
        plot = figures.heat_map(routing["load"], layers, experts, "share of assignments")
        parts.append(_figure(plot, f"Expert load, {model} model. From results.json."))
    return "".join(parts)


def _communication(runs: Sequence[FinishedRun]) -> str:
    body = [[run.method, str(run.seed), *map(_megabytes, _bytes(run))] for run in runs]
    header = ["method", "seed", "sent to clients, MB", "received, MB"]
    return f"<h2>Communication</h2>{_table(header, body)}"


def _bytes(run: FinishedRun) -> tuple[int, int]:
    lines = [m for m in run.metrics if m["model"] == "communication"]
    return sum(m["sent_bytes"] for m in lines), sum(m["received_bytes"] for m in lines)


def _privacy(runs: Sequence[FinishedRun]) -> str:
    """Tell what the shared part of every private run has cost, or nothing if none was private."""
    spent = [(r, [m for m in r.metrics if m["model"] == "privacy"]) for r in runs]
    body = [
        [
            run.method,
            str(run.seed),
            f"{lines[-1]['epsilon']:.3g}",
            f"{lines[-1]['delta']:g}",
            "a secret"
            if all(line["secret"] for line in lines)
            else "the recipe's seed (simulation)",
        ]
        for run, lines in spent
        if lines
    ]
    if not body:
        return ""
    note = (
        '<p class="soft">Of the shared part only; the recipe below says how it was accounted for. '
        "From metrics.jsonl.</p>"
    )
    header = ["method", "seed", "ε", "δ", "noise drawn from"]
    return f"<h2>Differential privacy</h2>{_table(header, body)}{note}"


def _origin(runs: Sequence[FinishedRun]) -> str:
    parts = ["<h2>Where the figures come from</h2>"]
    for run in runs:
        versions = ", ".join(
            f"{name} {run.about[name]}" for name in ("pomona", "python", "torch", "transformers")
        )
        command = shlex.join(map(str, run.about.get("command", [])))
        parts.append(
            f"<details><summary>{_text(run.method)}, seed {run.seed}: {_text(str(run.path))}</summary>"
            f"<p class=soft>{_text(versions)}</p><pre>{_text(command)}</pre>"
            f"<pre>{_text(run.recipe)}</pre></details>"
        )
    return "".join(parts) + f'<p class="soft">Written by Pomona {pomona.__version__}.</p>'


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{_text(cell)}</th>' for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _figure(svg: str, caption: str) -> str:
    label = html.escape(caption, quote=True)
    named = svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    return f"<figure>{named}<figcaption>{_text(caption)}</figcaption></figure>"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.2f}"


def _text(value: str) -> str:
    return html.escape(value)


def _sentence(text: str) -> str:
    """Begin with a capital letter; the others stay as they are (ROUGE-L)."""
    return text[:1].upper() + text[1:]
