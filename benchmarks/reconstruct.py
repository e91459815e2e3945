"""Dense to mixture: Pomona's default beside what the field would ask for, at equal active parameters.

    python benchmarks/reconstruct.py [--quick] [--active K] [--out runs/reconstruct] [--json PATH]

`rootstock-3m` and ten domains, half of the FFN active, as 8-choose-1 and 8-choose-2; every method is
retrained on the same tokens of the domains' training text, three seeds each, and measured on held-out
text that neither calibration nor retraining saw. Interrupted, it goes on where it was; `--active` makes the
runs of one setting only and records nothing, so that two processes can share the work. `--quick`: one seed,
few tokens, 8-choose-2 only. Material is found through POMONA_DATA and POMONA_MODELS.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from reconstructed_runs import FAITHFUL, FLAP, POMONA, dense_run, methods, peak_of_run, run_of
from record import ROOT, below, record
from scipy.stats import t as student

from pomona.artifacts.figures import svg
from pomona.cli.console import console, print_table
from pomona.evaluation.intervals import Interval, paired_bootstrap, ratio_bootstrap
from pomona.evaluation.loss import perplexity
from pomona.files import write_text
from pomona.pipelines.reconstruct import ReconstructSettings


def main() -> None:
    options = _options()
    seeds = (0,) if options.quick else (0, 1, 2)
    tokens = 20_000 if options.quick else 100_000
    rows: dict[str, list[dict[str, object]]] = {}
    bars: list[dict[str, object]] = []
    settings_of = (2,) if options.quick else (1, 2)
    for active in settings_of if options.active is None else (options.active,):
        setting = f"8-choose-{active}"
        found = {"dense": [dense_run(options.out)]}
        for seed in seeds if active == 1 else seeds[::-1]:  # two processes meet in the middle
            for name, settings in methods(active, tokens).items():
                found.setdefault(name, []).append(run_of(options.out, replace(settings, seed=seed)))
        for runs in found.values():
            runs.sort(key=lambda run: run.get("settings", {}).get("seed", 0))
        for name, settings in methods(active, tokens).items():
            found[name][0]["peak_bytes"] = peak_of_run(options.out, settings)
        made = methods(active, tokens)
        rows[setting] = [_row(name, runs, made.get(name)) for name, runs in found.items()]
        bars.append(_least(setting, rows[setting]))
        for opponent in (FLAP, FAITHFUL, "static, our compensation and retraining"):
            bars += _bars(setting, found, opponent)
        columns = [
            "method",
            "nats",
            "by seed",
            "over text",
            "perplexity",
            "total",
            "active",
            "seconds",
            "peak GiB",
        ]
        print_table(setting, columns, [_shown(row) for row in rows[setting]])
    if options.active is None:
        record(options.json, rows, bars, retraining_tokens=tokens)
        write_text(options.json.with_suffix(".svg"), _plot(rows))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="one seed, few tokens, 8-choose-2 only"
    )
    parser.add_argument("--active", type=int, choices=(1, 2), help="only make these runs")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "reconstruct")
    parser.add_argument(
        "--json", type=Path, default=ROOT / "benchmarks" / "results" / "reconstruct.json"
    )
    return parser.parse_args()


def _ratios(runs: list[dict]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (nats, tokens) per domain, each window's nats averaged over the seeds."""
    return [
        (np.mean([run["nats"][name] for run in runs], axis=0), np.array(counts, dtype=float))
        for name, counts in runs[0]["tokens"].items()
    ]


def _row(name: str, runs: list[dict], settings: ReconstructSettings | None) -> dict[str, object]:
    """Return a method's figures; `settings` None is the dense model.

    `retraining_tokens` are those of whole steps; `commits` of the runs by seed, null for one that does
    not tell.
    """
    how = settings.retrain if settings is not None else None
    over_text = ratio_bootstrap(_ratios(runs))
    domains = {
        domain: perplexity(float(top.sum() / bottom.sum()))
        for domain, (top, bottom) in zip(runs[0]["nats"], _ratios(runs), strict=True)
    }
    return {
        "method": name,
        "nats": over_text.mean,
        "interval_over_text": [over_text.low, over_text.high],
        "interval_over_seeds": _over_seeds(runs),
        "perplexity": perplexity(over_text.mean),
        "by_seed": [_nats(run) for run in runs],
        "perplexity_by_domain": domains,
        "retraining_tokens": sum(how.seen()) if how is not None else 0,
        "commits": [run.get("commit") for run in runs],
        "total": runs[0]["total"],
        "active": runs[0]["active"],
        "seconds": [run["seconds"] for run in runs],
        "peak_bytes": runs[0].get("peak_bytes"),
    }


def _nats(run: dict) -> float:
    return float(np.mean([top.sum() / bottom.sum() for top, bottom in _ratios([run])]))


def _over_seeds(runs: list[dict]) -> list[float] | None:
    """Return Student's 95 % interval of the mean over seeds; None for a single one."""
    if len(runs) == 1:
        return None
    values = [_nats(run) for run in runs]
    half = student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return [float(np.mean(values) - half), float(np.mean(values) + half)]


def _bars(setting: str, found: dict[str, list[dict]], opponent: str) -> list[dict[str, object]]:
    """Pomona below an opponent: over the same windows, and with intervals over seeds that do not meet."""
    ours, theirs = found[POMONA], found[opponent]
    difference: Interval = paired_bootstrap(_ratios(ours), _ratios(theirs)).difference
    bars: list[dict[str, object]] = [
        below(
            f"{setting}: {POMONA} − {opponent}, nats, upper end of the 95 % interval over text",
            difference.high,
            0.0,
        )
    ]
    high, low = _over_seeds(ours), _over_seeds(theirs)
    if high is not None and low is not None:
        name = f"{setting}: {POMONA}, nats, upper end over seeds below the lower one of {opponent}"
        bars.append(below(name, high[1], low[0]))
    return bars


def _least(setting: str, rows: list[dict]) -> dict[str, object]:
    """Pomona's default loses less against the dense model than every method that is not Pomona."""
    nats = {str(row["method"]): float(row["nats"]) for row in rows}
    dense = nats.pop("dense")
    lost = {name: value - dense for name, value in nats.items()}
    opponents = [value for name, value in lost.items() if not name.startswith(POMONA)]
    name = f"{setting}: nats that {POMONA} loses against dense, below the least of {len(opponents)} opponents"
    least = min(opponents)
    return below(name, lost[POMONA], least)


def _plot(rows: dict[str, list[dict]]) -> str:
    """Return nats per method with intervals over seeds, one panel per setting."""
    names = [str(row["method"]) for row in next(iter(rows.values()))][::-1]
    figure, panels = plt.subplots(
        1, len(rows), figsize=(10, 3.8), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, (setting, found) in zip(panels[0], rows.items(), strict=True):
        for row in found:
            low, high = row["interval_over_seeds"] or [row["nats"]] * 2
            place, ours = names.index(row["method"]), str(row["method"]).startswith(POMONA)
            color = "#c05621" if ours else "#2b6cb0"
            axes.plot([low, high], [place, place], color=color, linewidth=2)
            axes.plot(row["nats"], place, "o", color=color)
        axes.set(title=setting, xlabel="nats per token, held-out text of ten domains")
        axes.set_yticks(range(len(names)), names)
        axes.grid(axis="x", alpha=0.3)
    return svg(figure)


def _shown(row: dict) -> list[str]:
    spread = row["interval_over_seeds"] or row["interval_over_text"]
    seconds = sum(row["seconds"]) / len(row["seconds"])
    return [
        row["method"],
        f"{row['nats']:.3f}",
        "–".join(f"{value:.3f}" for value in spread),
        "–".join(f"{value:.3f}" for value in row["interval_over_text"]),
        f"{row['perplexity']:.1f}",
        f"{row['total']:,}",
        f"{row['active']:,}",
        f"{seconds:.0f}",
        f"{row['peak_bytes'] / 2**30:.2f}" if row["peak_bytes"] else "",
    ]


if __name__ == "__main__":
    main()
    console.print("every row with its seeds is in the JSON")
