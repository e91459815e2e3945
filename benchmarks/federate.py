"""Personalised federated tuning: the recipes beside FLEx, where sharing should pay and where it may not.

    python benchmarks/federate.py [--quick] [--setting NAME [--method NAME …]] [--out DIR] [--json PATH]

`rootstock-3m` made into eight experts, two active, then Dolly in four settings: one task per client, the
same with 100 rows per client, and ten clients with Dirichlet mixtures (0.5 and 1.0), of whom half take part
in a round; three seeds each. All methods take as many steps on as many rows, cut to 128 tokens; strategies that
share LoRA on the attention and nothing else beside FedAvg's mean are made where sharing should pay most, with
100 rows. Also the gain of federating over a client alone with the same parts, as a function of the rows per
client. Interrupted, it goes on where it was. `--setting` makes one of these alone and leaves what the JSON
has of the others; with `--method` it makes these runs and records nothing, so that two processes can
share the work. `--quick`: two seeds of the first setting, four rounds, the main methods. Material is found
through POMONA_DATA and POMONA_MODELS.
"""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from record import ROOT, commit, record
from subjects import rootstock
from transformers import AutoConfig

from pomona.artifacts.figures import svg
from pomona.artifacts.finished import FinishedRun, load_runs
from pomona.artifacts.run import RunDirectory
from pomona.artifacts.table import BASE, Line, compare, differences
from pomona.cli.console import console, print_table, progress_bars
from pomona.federate import federate
from pomona.federation.partition import ByCategory, Dirichlet, Partition
from pomona.federation.settings import FederateSettings
from pomona.federation.strategies import Scaffold
from pomona.files import write_text
from pomona.progress import titled
from pomona.recipe import dump, read_recipe

TASKS = ("closed_qa", "information_extraction", "classification", "summarization")
LENGTH = 128
ROWS = (25, 50, 100, 200, 400)
OURS, CEILING = "flex", "centralised"
ALONE = ("local-only-graft", "local-only-flex")
VARIANTS = ("lora-on-expert", "flex-no-gate", "flex-reconstruction")  # of ours, one thing changed
CEILINGS = (CEILING, "centralised-attention")
METHODS = (
    OURS,
    "local-only",
    *ALONE,
    "fedavg",
    "feddpa",
    "fedavg-finetune",
    "fedavg-experts",
    "fedrep",
    "flex-faithful",
    *VARIANTS,
    *CEILINGS,
)
STRATEGIES = (
    "fedsa-lora",
    "flexlora",
    "flora",
    "ffa-lora",
    "fedprox",
    "fedavgm",
    "fedadagrad",
    "fedadam",
    "fedyogi",
    "scaffold",
)
MAIN = ("local-only", *ALONE, "fedavg", OURS)
SETTINGS: dict[str, tuple[Partition, Sequence[str]]] = {
    "one task each": (ByCategory(TASKS), METHODS),
    "100 rows each": (ByCategory(TASKS, rows=100), METHODS),
    "100 rows each, strategies": (ByCategory(TASKS, rows=100), (OURS, "fedavg", *STRATEGIES)),
    "Dirichlet 0.5": (Dirichlet(10, 0.5), METHODS),
    "Dirichlet 1.0": (Dirichlet(10, 1.0), METHODS),
}
CURVE = "gain by rows"


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    os.environ.setdefault("POMONA_DATA", str(ROOT.parent / "shared" / "data"))
    os.environ.setdefault("POMONA_MODELS", str(ROOT.parent / "shared" / "models"))
    model = rootstock(options.out)
    seeds, rounds = ((0, 1), 4) if options.quick else ((0, 1, 2), 20)
    names = [options.setting] if options.setting else [*SETTINGS, CURVE]
    result = _recorded(options.json) if options.setting else {"rows": {}, "commits": {}}
    for name in names[:1] if options.quick else names:
        if name == CURVE:
            result["gain_by_rows"] = list(_curve(options.out, model, seeds, rounds))
        else:
            partition, methods = SETTINGS[name]
            methods = options.method or (MAIN if options.quick else methods)
            rows = _rows(_runs(options.out, model, partition, methods, seeds, rounds))
            columns = [
                "method",
                "nats",
                "over rows",
                "worst",
                "spread",
                "− ours",
                "p",
                "forgot",
                "MB",
            ]
            print_table(name, columns, [_shown(row) for row in rows])
            result["rows"][name] = rows
        result["commits"][name] = commit()
    if not options.method:
        bars = [bar for name, rows in result["rows"].items() for bar in _bars(name, rows)]
        record(options.json, bars=bars, **result)
        if "gain_by_rows" in result:
            write_text(options.json.with_suffix(".svg"), _plot(result["gain_by_rows"]))


def _recorded(path: Path) -> dict[str, Any]:
    """Return what the JSON has of every setting, with the commit that each was made at."""
    found = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    kept = {
        key: value for key, value in found.items() if key in ("rows", "commits", "gain_by_rows")
    }
    return {"rows": {}, "commits": {}, **kept}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two seeds, four rounds, one setting")
    parser.add_argument("--setting", choices=(*SETTINGS, CURVE), help="make and record this one")
    parser.add_argument(
        "--method",
        action="append",
        choices=(*METHODS, *STRATEGIES),
        help="with --setting: make these runs, record nothing",
    )
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "federate")
    parser.add_argument("--json", type=Path, help="default: results/federate.json beside this file")
    options = parser.parse_args()
    kept = (
        options.out / "quick.json" if options.quick else ROOT / "benchmarks/results/federate.json"
    )
    options.json = options.json or kept
    if options.method and options.setting in (None, CURVE):
        parser.error("--method needs a --setting with methods")
    return options


def _runs(
    out: Path,
    model: Path,
    partition: Partition,
    methods: Sequence[str],
    seeds: Sequence[int],
    rounds: int,
) -> list[FinishedRun]:
    """Return the finished runs, made where they are not there yet."""
    paths = [
        _run(out, _settings(model, method, partition, seed, rounds))
        for seed in seeds
        for method in methods
    ]
    return load_runs(paths)


def _settings(
    model: Path, method: str, partition: Partition, seed: int, rounds: int
) -> FederateSettings:
    """Return a recipe on this model and these clients, evaluated alike."""
    given = {"model": str(model.resolve()), "seed": seed, "rounds": rounds}
    recipe = read_recipe(ROOT / "recipes" / f"{method}.toml", FederateSettings, given)
    if method == "flex-faithful":  # its form and its gate, at the sizes and rates of the others
        plain = read_recipe(ROOT / "recipes" / "fedavg.toml", FederateSettings, given)
        assert recipe.graft is not None
        graft = replace(recipe.graft, rank=plain.adapter.rank, alpha=plain.adapter.alpha)
        adapter = replace(plain.adapter, targets=recipe.adapter.targets)
        local = replace(plain.local, router_loss=recipe.local.router_loss)
        recipe = replace(plain, name=method, graft=graft, adapter=adapter, local=local)
    if method == "fedrep":  # the last two layers of this model, not of the recipe's
        depth = AutoConfig.from_pretrained(model).num_hidden_layers
        assert recipe.personal is not None
        recipe = replace(
            recipe,
            adapter=replace(recipe.adapter, layers=tuple(range(depth - 2))),
            personal=replace(recipe.personal, layers=(depth - 2, depth - 1)),
        )
    held_out = Path(os.environ["POMONA_DATA"]) / "calibration"
    evaluation = replace(recipe.evaluation, every=rounds, answers=0, forgetting=held_out, windows=4)
    local = recipe.local
    if isinstance(partition, Dirichlet) and recipe.pooled:
        local = replace(
            local, steps=local.steps * 5 // 4
        )  # five clients' steps in a round, not four's
    data = replace(recipe.data, partition=partition)
    fraction = 0.5 if isinstance(partition, Dirichlet) and not recipe.pooled else 1.0
    strategy = recipe.strategy
    if isinstance(strategy, Scaffold):
        strategy = replace(strategy, fraction=fraction)
    finish = (
        recipe.finish
    )  # its rounds are among those that all methods have; everybody takes part in them
    if finish is not None:
        finish = replace(finish, rounds=rounds // 4)
    return replace(
        recipe,
        data=data,
        evaluation=evaluation,
        local=local,
        max_length=LENGTH,
        fraction=fraction,
        strategy=strategy,
        finish=finish,
        rounds=rounds - (round(finish.rounds / fraction) if finish else 0),
    )


def _run(out: Path, settings: FederateSettings) -> Path:
    recipe = dump(settings)
    key = hashlib.sha256(recipe.encode()).hexdigest()[:12]
    path = out / "runs" / f"{settings.name}-{settings.seed}-{key}"
    about = {
        "command": ["python", *sys.argv],
        "method": settings.name,
        "seed": settings.seed,
    }
    if not (path / "results.json").is_file():
        with RunDirectory.open(path, recipe, about) as run, progress_bars() as progress:
            federate(settings, run, titled(path.name, progress))
    return path


def _rows(runs: Sequence[FinishedRun]) -> list[dict[str, Any]]:
    """Return a row per method: its figures, and how it differs from ours on the same rows."""
    losses = compare(runs, "loss")
    against = {d.first: d for d in differences(runs, "loss", OURS)} if _has(runs, OURS) else {}
    return [_row(line, runs, against.get(line.method)) for line in losses]


def _has(runs: Sequence[FinishedRun], method: str) -> bool:
    return any(run.method == method for run in runs)


def _row(line: Line, runs: Sequence[FinishedRun], against: Any) -> dict[str, Any]:
    own = [run for run in runs if run.method == line.method]
    sent = [_megabytes(run) for run in own]
    return {
        "method": line.method,
        "seeds": list(line.seeds),
        "nats": line.mean.mean,
        "interval_over_rows": [line.mean.low, line.mean.high],
        "interval_over_seeds": [line.over_seeds.low, line.over_seeds.high]
        if line.over_seeds
        else None,
        "clients": dict(line.clients),
        "worst": line.worst,
        "spread": line.spread,
        "minus_ours": against.rows.difference.mean if against else None,
        "minus_ours_interval": [against.rows.difference.low, against.rows.difference.high]
        if against
        else None,
        "p_over_rows": against.rows.p_value if against else None,
        "p_holm": against.corrected if against else None,
        "p_over_seeds": against.seeds.p_value if against and against.seeds else None,
        "held_out": _held_out(runs[:1] if line.method == BASE else own, line.method),
        "megabytes": float(np.mean(sent)) if sent else 0.0,
    }


def _megabytes(run: FinishedRun) -> float:
    lines = [m for m in run.metrics if m["model"] == "communication"]
    return sum(m["sent_bytes"] + m["received_bytes"] for m in lines) / 1e6


def _held_out(runs: Sequence[FinishedRun], method: str) -> float:
    """Return the loss of held-out text under the models that clients end up with."""
    model = BASE if method == BASE else runs[0].served
    lines = [line for run in runs for line in run.forgetting if line["model"] == model]
    return sum(line["nats"] for line in lines) / sum(line["tokens"] for line in lines)


def _bars(setting: str, rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The bars of a setting; parity where the ceiling itself is no better than a client alone.

    The variants of our own recipe, of which each changes one choice, stand beside the bars and are no
    opponents in them. Forgetting is compared with the opponent that fits best: not to train forgets least.
    """
    by_name = {row["method"]: row for row in rows}
    rivals = [r for r in rows if r["method"] not in (BASE, OURS, *CEILINGS, *VARIANTS)]
    if OURS not in by_name or not rivals:
        return
    ours, second = by_name[OURS], min(rivals, key=lambda row: row["nats"])
    alone = min((by_name[n] for n in ALONE if n in by_name), key=lambda r: r["nats"], default=None)
    ceiling = by_name.get(CEILING)
    name = f"{setting}: {OURS} against the next best, {second['method']}"
    if alone and ceiling and ceiling["nats"] >= alone["nats"]:
        yield _bar(
            f"{setting}: parity with {alone['method']}, as pooling with the same graft is no better: least of "
            "the paired interval of ours − its nats",
            -alone["minus_ours_interval"][1],
            0.0,
        )
    else:
        yield _bar(f"{name}, mean nats", ours["nats"], second["nats"])
        better = second["minus_ours"] > 0
        yield _bar(f"{name}, p over rows", second["p_over_rows"] if better else 1.0, 0.05)
    worst = min(rivals, key=lambda row: row["worst"])
    yield _bar(
        f"{setting}: worst client against that of {worst['method']}", ours["worst"], worst["worst"]
    )
    yield _bar(
        f"{setting}: held-out text against the best baseline, {second['method']}",
        ours["held_out"],
        second["held_out"],
    )


def _bar(name: str, value: float | None, bar: float) -> dict[str, Any]:
    return {"name": name, "value": value, "bar": bar, "holds": value is not None and value <= bar}


def _curve(out: Path, model: Path, seeds: Sequence[int], rounds: int) -> Iterator[dict[str, Any]]:
    """Return by how much federating lowers the loss of a client with the same graft, by its rows."""
    for rows in (*ROWS, 0):
        partition = ByCategory(TASKS, rows=rows)
        runs = _runs(out, model, partition, (ALONE[-1], OURS), seeds, rounds)
        found = next(iter(differences(runs, "loss", OURS)))
        yield {
            "rows": rows or "all",
            "gain": found.rows.difference.mean,
            "interval": [found.rows.difference.low, found.rows.difference.high],
            "p_over_rows": found.rows.p_value,
        }


def _plot(curve: Sequence[Mapping[str, Any]]) -> str:
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    places = range(len(curve))
    gains = np.array([point["gain"] for point in curve])
    low, high = np.array([point["interval"] for point in curve]).T
    axes.errorbar(places, gains, (gains - low, high - gains), fmt="o-", color="#c05621", capsize=3)
    axes.axhline(0, color="#4a5568", linewidth=1)
    axes.set_xticks(places, [str(point["rows"]) for point in curve])
    axes.set(
        xlabel="train rows per client",
        ylabel="nats that federating gains\nover the same graft alone",
    )
    axes.grid(alpha=0.3)
    return svg(figure)


def _shown(row: Mapping[str, Any]) -> list[str]:
    low, high = row["interval_over_rows"]
    return [
        row["method"],
        f"{row['nats']:.4f}",
        f"{low:.3f}–{high:.3f}",
        f"{row['worst']:.3f}",
        f"{row['spread']:.3f}",
        "" if row["minus_ours"] is None else f"{row['minus_ours']:+.4f}",
        "" if row["p_over_rows"] is None else f"{row['p_over_rows']:.3f}",
        f"{row['held_out']:.3f}",
        f"{row['megabytes']:.1f}",
    ]


if __name__ == "__main__":
    main()
    console.print("every row with its seeds is in the JSON")
