"""Dense to mixture: Pomona's default beside what the field would ask for, at equal active parameters.

    python benchmarks/reconstruct.py [--quick] [--active K] [--out runs/reconstruct] [--json PATH]

`rootstock-3m` and ten domains, half of the FFN active, as 8-choose-1 and 8-choose-2; every method is
retrained on the same tokens of the domains' training text, three seeds each, and measured on held-out
text that neither calibration nor retraining saw. Interrupted, it goes on where it was; `--active` makes the
runs of one setting only and records nothing, so that two processes can share the work. `--quick`: one seed,
few tokens, 8-choose-2 only. Material is found through POMONA_DATA and POMONA_MODELS.
"""

import argparse
import hashlib
import json
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from time import monotonic

import matplotlib.pyplot as plt
import numpy as np
from record import ROOT, below, commit, peak_bytes, record
from scipy.stats import t as student

from pomona.artifacts.figures import svg
from pomona.cli.console import console, print_table, progress_bars
from pomona.data.texts import consecutive_windows, read_domains
from pomona.evaluation.intervals import Interval, paired_bootstrap, ratio_bootstrap
from pomona.evaluation.loss import perplexity, window_losses
from pomona.files import read_object, write_json, write_text
from pomona.models.experts import freeze
from pomona.models.fingerprint import checkpoint_digests
from pomona.models.loading import load_model, load_tokenizer
from pomona.progress import titled
from pomona.reconstruct import ReconstructSettings, reconstruct
from pomona.reconstruction.compensate import Bias, NoCompensation
from pomona.reconstruction.planners import ActivationClusters, RandomSplit, TopChannels
from pomona.reconstruction.retraining import ExpertStage, Objective, Retraining, RouterStage
from pomona.reconstruction.router import RandomRouter
from pomona.reconstruction.specialise import Specialise

FLAP, FAITHFUL, POMONA = "static FLAP", "DIVE faithful", "Pomona"
PLAIN = Objective(loss="cross-entropy", balance=0.0, z=0.0, straight_through=False)


def methods(active: int, tokens: int) -> dict[str, ReconstructSettings]:
    """Return every method with half of the dense FFN active; `active` 1 or 2 of eight experts."""
    lora = ExpertStage(tokens=tokens, learning_rate=3e-3, router="absolute")
    plain = Retraining(experts=lora, objective=PLAIN)
    common = ReconstructSettings(
        experts=8, active=active, keep=0.5 / active, windows=32, affinity_windows=8, retrain=plain
    )
    dealt = replace(
        common,
        compensation=NoCompensation(),
        router=RandomRouter(),
        specialise=Specialise(rounds=0),
    )
    first = max(tokens // 10, plain.step_tokens)
    staged = replace(
        plain,
        router=RouterStage(tokens=first, temperature=0.05 if active == 1 else 0.5),
        experts=replace(lora, tokens=tokens - first),
    )
    static = replace(common, experts=1, active=1, keep=0.5, grouping="all")
    default = replace(common, retrain=Retraining(experts=ExpertStage(tokens=tokens)))
    full = ExpertStage(tokens=tokens, learning_rate=5e-4, experts="full")
    for_one = Retraining(experts=replace(full, learning_rate=1e-3))  # better for a single FFN
    return {
        FLAP: replace(static, compensation=Bias()),
        "static, our compensation and retraining": replace(static, retrain=for_one),
        "random split (LLaMA-MoE)": replace(
            dealt, active=4, keep=0.125, planner=RandomSplit(), grouping="all"
        ),
        "activation clusters (CMoE)": replace(
            dealt, active=3, keep=0.1, planner=ActivationClusters(shared=0.2), grouping="all"
        ),
        "copies": replace(dealt, grouping="all"),
        "DIVE without affinity": replace(dealt, grouping="random", retrain=staged),
        FAITHFUL: replace(dealt, retrain=staged),
        POMONA: default,
        "Pomona, experts trained in full": replace(common, retrain=Retraining(experts=full)),
        "Pomona, half of the active channels shared": replace(
            default, keep=0.25 / active, planner=TopChannels(shared=0.25)
        ),
    }


def main() -> None:
    options = _options()
    seeds = (0,) if options.quick else (0, 1, 2)
    tokens = 20_000 if options.quick else 100_000
    rows: dict[str, list[dict[str, object]]] = {}
    bars: list[dict[str, object]] = []
    settings_of = (2,) if options.quick else (1, 2)
    for active in settings_of if options.active is None else (options.active,):
        setting = f"8-choose-{active}"
        found = {"dense": [_dense(options.out)]}
        for seed in seeds if active == 1 else seeds[::-1]:  # two processes meet in the middle
            for name, settings in methods(active, tokens).items():
                found.setdefault(name, []).append(_one(options.out, replace(settings, seed=seed)))
        for runs in found.values():
            runs.sort(key=lambda run: run.get("settings", {}).get("seed", 0))
        for name, settings in methods(active, tokens).items():
            found[name][0]["peak_bytes"] = _peak(options.out, settings)
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


def _data() -> Path:
    return Path(os.environ.get("POMONA_DATA", ROOT.parent / "shared" / "data")) / "calibration"


def _model() -> Path:
    return Path(os.environ.get("POMONA_MODELS", ROOT.parent / "shared" / "models")) / "rootstock-3m"


def _dense(out: Path) -> dict:
    path = out / "dense.json"
    if not _kept(path):
        size = sum(p.numel() for p in load_model(_model()).parameters())
        found = {"total": size, "active": size, "seconds": 0.0, **_measured(_model())}
        write_json(path, {**_made_of(), **found})
    return read_object(path)


def _made_of() -> dict[str, object]:
    return {"commit": commit(), "weights": checkpoint_digests(_model())}


def _kept(path: Path) -> bool:
    """Whether a run is there and of the model as it is; those without a note of it are taken for that."""
    now = _made_of()["weights"]
    return path.exists() and read_object(path).get("weights", now) == now


def _one(out: Path, settings: ReconstructSettings) -> dict:
    """Reconstruct, retrain and measure with some settings, or read what was measured with them."""
    path = out / f"{_key(settings)}.json"
    if _kept(path):
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
            **_made_of(),
            "settings": settings.to_json(),
            "total": result.total_parameters,
            "active": result.active_parameters,
            "seconds": seconds,
            **_measured(made),
        },
    )
    shutil.rmtree(made)
    return read_object(path)


def _peak(out: Path, settings: ReconstructSettings) -> int:
    """Return the largest resident set of a process that does nothing but this, with a few steps of training.

    More steps need no more memory.
    """
    path = out / f"{_key(settings)}.peak.json"
    if not path.exists():
        with ProcessPoolExecutor(1, get_context("spawn")) as child:
            write_json(path, {"bytes": child.submit(_peak_of, out / "peak", settings).result()})
    return read_object(path)["bytes"]


def _peak_of(made: Path, settings: ReconstructSettings) -> int:
    how = settings.retrain
    assert how is not None
    few = 3 * how.length * how.batch
    router = replace(how.router, tokens=min(few, how.router.tokens))
    how = replace(how, router=router, experts=replace(how.experts, tokens=few))
    shutil.rmtree(made, ignore_errors=True)
    reconstruct(_model(), read_domains(_data()), made, replace(settings, retrain=how))
    shutil.rmtree(made)
    return peak_bytes()


def _key(settings: ReconstructSettings) -> str:
    """Name a run by its settings: some baselines are the same in both.

    What came later is not in the name while it is as it was without, so that runs of before are found.
    """
    told = settings.to_json()
    if told["retrain"] is not None:
        later = {"warm_up": RouterStage().warm_up, "floor": RouterStage().floor}
        router = told["retrain"]["router"]
        told["retrain"]["router"] = {k: v for k, v in router.items() if later.get(k) != v}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


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
