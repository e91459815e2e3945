"""Dense to mixture: Pomona's default beside what the field would ask for, at equal active parameters.

    python benchmarks/reconstruct.py [--quick] [--out runs/reconstruct] [--json PATH]

`rootstock-3m` and ten domains, half of the FFN active, as 8-choose-1 and 8-choose-2; every method is
retrained on the same tokens of the domains' training text, three seeds each, and measured on held-out
text that neither calibration nor retraining saw. Interrupted, it goes on where it was. `--quick`: one
seed, few tokens, 8-choose-2 only. Material is found through POMONA_DATA and POMONA_MODELS.
"""

import argparse
import os
import resource
import shutil
from dataclasses import replace
from pathlib import Path
from time import monotonic

import numpy as np
import torch
from record import ROOT, record

from pomona.cli.console import console, print_table, progress_bars
from pomona.data.texts import consecutive_windows, read_domains
from pomona.evaluation.intervals import Interval, paired_bootstrap, ratio_bootstrap
from pomona.evaluation.loss import perplexity, window_losses
from pomona.files import read_object, write_json
from pomona.models.experts import freeze
from pomona.models.loading import load_model, load_tokenizer
from pomona.progress import titled
from pomona.reconstruct import ReconstructSettings, reconstruct
from pomona.reconstruction.compensate import Bias, NoCompensation
from pomona.reconstruction.planners import ActivationClusters, RandomSplit, TopChannels
from pomona.reconstruction.retraining import ExpertStage, Objective, Retraining, RouterStage
from pomona.reconstruction.router import RandomRouter

FLAP, FAITHFUL, POMONA = "static FLAP", "DIVE faithful", "Pomona"
PLAIN = Objective(loss="cross-entropy", balance=0.0, z=0.0, straight_through=False)


def methods(active: int, tokens: int) -> dict[str, ReconstructSettings]:
    """Return every method with half of the dense FFN active; `active` 1 or 2 of eight experts."""
    lora = ExpertStage(tokens=tokens, learning_rate=3e-3)
    plain = Retraining(experts=lora, objective=PLAIN)
    common = ReconstructSettings(
        experts=8, active=active, keep=0.5 / active, windows=64, affinity_windows=8, retrain=plain
    )
    faithful = replace(common, compensation=NoCompensation(), router=RandomRouter())
    staged = replace(
        plain,
        router=RouterStage(tokens=tokens // 10, temperature=0.05 if active == 1 else 0.5),
        experts=replace(lora, tokens=tokens - tokens // 10),
    )
    static = replace(common, experts=1, active=1, keep=0.5, grouping="all")
    full = ExpertStage(tokens=tokens, learning_rate=1e-3, experts="full")
    distilled = Retraining(experts=full)
    shared = {"active": 1, "keep": 0.25, "planner": TopChannels(shared=0.25)}
    return {
        FLAP: replace(static, compensation=Bias()),
        "static, our compensation and retraining": replace(static, retrain=distilled),
        "random split (LLaMA-MoE)": replace(
            faithful, active=4, keep=0.125, planner=RandomSplit(), grouping="all"
        ),
        "activation clusters (CMoE)": replace(
            faithful, active=3, keep=0.1, planner=ActivationClusters(shared=0.2), grouping="all"
        ),
        "copies": replace(faithful, grouping="all"),
        "DIVE without affinity": replace(faithful, grouping="random", retrain=staged),
        FAITHFUL: replace(faithful, retrain=staged),
        POMONA: replace(common, retrain=distilled, **(shared if active == 1 else {})),
    }


def main() -> None:
    options = _options()
    torch.set_num_threads(2)
    seeds = (0,) if options.quick else (0, 1, 2)
    tokens = 40_000 if options.quick else 300_000
    rows: dict[str, list[dict[str, object]]] = {}
    bars: list[dict[str, object]] = []
    for active in (2,) if options.quick else (1, 2):
        setting = f"8-choose-{active}"
        found = {"dense": [_dense(options.out)]}
        for seed in seeds:
            for name, settings in methods(active, tokens).items():
                path = options.out / f"{setting}-{name.replace(' ', '-')}-{seed}.json"
                found.setdefault(name, []).append(_one(path, replace(settings, seed=seed)))
        rows[setting] = [_row(name, runs) for name, runs in found.items()]
        for opponent in (FLAP, FAITHFUL):
            bars.append(_bar(setting, found, opponent))
        columns = ["method", "nats", "from", "to", "perplexity", "active", "seconds"]
        print_table(setting, columns, [_shown(row) for row in rows[setting]])
    record(options.json, rows, bars, retraining_tokens=tokens)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="one seed, few tokens, 8-choose-2 only"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "reconstruct")
    parser.add_argument(
        "--json", type=Path, default=ROOT / "benchmarks" / "results" / "reconstruct.json"
    )
    return parser.parse_args()


def _data() -> Path:
    return Path(os.environ.get("POMONA_DATA", ROOT.parent / "shared" / "data")) / "calibration"


def _model() -> Path:
    return Path(os.environ.get("POMONA_MODELS", ROOT.parent / "shared" / "models")) / "rootstock-3m"


def _dense(out: Path) -> dict:
    path = out / "dense.json"
    if not path.exists():
        size = sum(p.numel() for p in load_model(_model()).parameters())
        write_json(path, {"total": size, "active": size, "seconds": 0.0, **_measured(_model())})
    return read_object(path)


def _one(path: Path, settings: ReconstructSettings) -> dict:
    """Reconstruct, retrain and measure one method with one seed, or read what was measured."""
    if path.exists() and read_object(path)["settings"] == settings.to_json():
        return read_object(path)
    made = path.with_suffix("")
    shutil.rmtree(made, ignore_errors=True)
    began = monotonic()
    with progress_bars() as progress:
        result = reconstruct(
            _model(), read_domains(_data()), made, settings, titled(made.name, progress)
        )
    seconds = monotonic() - began
    write_json(
        path,
        {
            "settings": settings.to_json(),
            "total": result.total_parameters,
            "active": result.active_parameters,
            "seconds": seconds,
            "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            **_measured(made),
        },
    )
    shutil.rmtree(made)
    return read_object(path)


def _measured(folder: Path) -> dict[str, object]:
    """Return every domain's held-out nats and tokens, window by window."""
    model, tokenizer = load_model(folder, "float32"), load_tokenizer(folder)
    freeze(model)
    nats: dict[str, list[float]] = {}
    tokens: dict[str, list[int]] = {}
    for name, texts in read_domains(_data(), "valid").items():
        losses = window_losses(model, consecutive_windows(texts, tokenizer, 256, 32))
        nats[name] = [window.nats for window in losses]
        tokens[name] = [window.tokens for window in losses]
    return {"nats": nats, "tokens": tokens}


def _ratios(runs: list[dict]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (nats, tokens) per domain, each window's nats averaged over the seeds."""
    return [
        (np.mean([run["nats"][name] for run in runs], axis=0), np.array(counts, dtype=float))
        for name, counts in runs[0]["tokens"].items()
    ]


def _row(name: str, runs: list[dict]) -> dict[str, object]:
    mean = ratio_bootstrap(_ratios(runs))
    by_seed = [ratio_bootstrap(_ratios([run]), draws=10).mean for run in runs]
    domains = {
        domain: float(top.sum() / bottom.sum())
        for domain, (top, bottom) in zip(runs[0]["nats"], _ratios(runs), strict=True)
    }
    return {
        "method": name,
        "nats": mean.mean,
        "interval": [mean.low, mean.high],
        "perplexity": perplexity(mean.mean),
        "by_seed": by_seed,
        "domains": domains,
        "total": runs[0]["total"],
        "active": runs[0]["active"],
        "seconds": [run["seconds"] for run in runs],
        "peak_bytes": [run.get("peak_bytes") for run in runs],
    }


def _bar(setting: str, found: dict[str, list[dict]], opponent: str) -> dict[str, object]:
    """Pomona below an opponent over the same windows, the whole interval of the difference below 0."""
    difference: Interval = paired_bootstrap(
        _ratios(found[POMONA]), _ratios(found[opponent])
    ).difference
    return {
        "name": f"{setting}: {POMONA} − {opponent}, nats (upper end of the 95 % interval)",
        "value": difference.high,
        "bar": 0.0,
        "holds": difference.high < 0,
    }


def _shown(row: dict) -> list[str]:
    low, high = row["interval"]
    seconds = sum(row["seconds"]) / len(row["seconds"])
    figures = [f"{value:.3f}" for value in (row["nats"], low, high)]
    return [
        row["method"],
        *figures,
        f"{row['perplexity']:.1f}",
        f"{row['active']:,}",
        f"{seconds:.0f}",
    ]


if __name__ == "__main__":
    main()
    console.print("every row with its seeds is in the JSON")
