"""Calibration, affinity and assembly: time and memory beside a plain twin that keeps everything.

    python benchmarks/reconstruct_speed.py [--windows 64] [--affinity-windows 32] [--length 256] [--repeats 3]
                                           [--threads 2] [--out DIR] [--json PATH]

`rootstock-3m` and the ten calibration domains. The twin (`peers/plain_reconstruction.py`) keeps all activations
and then computes with them, has a copy of the model for every domain it prunes for, with zeros for what is
pruned, computes all logits, and holds all pruned models and the mixture in memory before anything is written.
Both do the same: variances of all channels, the perplexity of every pruned model on every domain, the
correlation of all domains' scores, and a mixture of eight experts of 128 of 512 channels. Every stage of either
is a process of its own; its memory is the largest resident set beyond that with model and windows loaded.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from peers import plain_reconstruction as plain
from record import ROOT, at_least, at_most, peak_bytes, record
from subjects import find_material, material
from torch import Tensor
from transformers import AutoModelForCausalLM

from pomona.artifacts.mixture import write_mixture
from pomona.cli.console import print_table
from pomona.data.texts import read_domains
from pomona.models.dense import dense_family
from pomona.models.experts import freeze
from pomona.models.loading import load_model
from pomona.models.weights import Checkpoint
from pomona.progress import silent
from pomona.reconstruction.affinity import perplexity_affinity, score_affinity
from pomona.reconstruction.calibrate import calibrate
from pomona.reconstruction.compensate import NoCompensation
from pomona.reconstruction.experts import layer_experts
from pomona.reconstruction.ffn import DenseModel, dense_model, keep_mask, top_channels
from pomona.reconstruction.plan import ExpertPlan
from pomona.reconstruction.router import RandomRouter
from pomona.reconstruction.scores import score_layers
from pomona.reconstruction.settings import ReconstructSettings
from pomona.reconstruction.specialise import Specialise
from pomona.reconstruction.windows import Windows, draw_windows

STAGES = ("calibration", "affinity by perplexity", "affinity by scores", "assembly")
OURS, TWIN = "Pomona", "plain twin"
EXPERTS = 8


@dataclass(frozen=True)
class Bench:
    """What every stage begins with: the model in memory, windows drawn, channels chosen for each domain."""

    folder: Path
    model: Any = field(repr=False)
    dense: DenseModel = field(repr=False)
    windows: Windows = field(repr=False)
    settings: ReconstructSettings
    scratch: Path

    @property
    def kept(self) -> list[Tensor]:
        """Channels of every domain [L, W], by chance: which they are changes no time."""
        generator = torch.Generator().manual_seed(0)
        layers, channels = len(self.dense.ffns), self.dense.channels
        width = self.settings.width(channels)
        return [
            top_channels(torch.rand(layers, channels, generator=generator), width)
            for _ in self.windows.calibration
        ]


def main() -> None:
    options = _options()
    find_material()
    torch.set_num_threads(options.threads)
    if options.child:
        print(json.dumps(_child(options, *options.child)))
        return
    rows = [row for stage in STAGES for row in _stage(options, stage)]
    columns = [
        "stage",
        "who",
        "seconds",
        "MB beyond the model",
        "times faster",
        "× memory",
        "apart",
    ]
    print_table("reconstruction", columns, [_shown(row) for row in rows])
    record(options.json, rows, list(_bars(rows)), threads=options.threads)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--affinity-windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child", nargs=2, metavar=("STAGE", "WHO"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "reconstruct-speed")
    kept = ROOT / "benchmarks" / "results" / "reconstruct_speed.json"
    parser.add_argument("--json", type=Path, default=kept)
    return parser.parse_args()


def _stage(options: argparse.Namespace, stage: str) -> Iterator[dict[str, Any]]:
    """Measure both at one stage, and compare what they found."""
    shutil.rmtree(options.out, ignore_errors=True)
    options.out.mkdir(parents=True)
    found: dict[str, dict[str, Any]] = {}
    for who in (OURS, TWIN):
        given = {
            "--windows": options.windows,
            "--affinity-windows": options.affinity_windows,
            "--length": options.length,
            "--repeats": options.repeats,
            "--threads": options.threads,
            "--out": options.out,
        }
        words = [str(word) for pair in given.items() for word in pair]
        command = [sys.executable, __file__, *words, "--child", stage, who]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found[who] = json.loads(done.stdout.splitlines()[-1])
    ours, theirs = (torch.load(options.out / f"{who}.pt") for who in (OURS, TWIN))
    apart = max(
        float((one.double() - theirs[name].double()).abs().max() / one.double().abs().max())
        for name, one in ours.items()
    )
    medians = {who: statistics.median(own["seconds"]) for who, own in found.items()}
    for who, own in found.items():
        yield {
            "stage": stage,
            "who": who,
            **own,
            "times_faster": medians[TWIN] / medians[who],
            "times_memory": own["bytes"] / found[TWIN]["bytes"],
            "apart": apart,
        }


def _child(options: argparse.Namespace, stage: str, who: str) -> dict[str, Any]:
    bench = _bench(options)
    ways = _ours(bench) if who == OURS else _twin(bench)
    Path("/proc/self/clear_refs").write_text("5")  # the largest resident set begins anew
    before = _resident_bytes()
    seconds: list[float] = []
    found: Found = dict
    for _ in range(options.repeats):
        began = time.perf_counter()
        found = ways[stage]()
        seconds.append(time.perf_counter() - began)
    taken = peak_bytes() - before
    torch.save(dict(found()), options.out / f"{who}.pt")
    return {"seconds": seconds, "bytes": taken}


def _resident_bytes() -> int:
    status = Path("/proc/self/status").read_text("utf-8")
    (line,) = (line for line in status.splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


def _bench(options: argparse.Namespace) -> Bench:
    settings = ReconstructSettings(
        experts=EXPERTS,
        active=2,
        keep=0.25,
        windows=options.windows,
        affinity_windows=options.affinity_windows,
        length=options.length,
        compensation=NoCompensation(),
        router=RandomRouter(),
        specialise=Specialise(rounds=0),
    )
    folder = Path(os.environ["POMONA_MODELS"]) / "rootstock-3m"
    checkpoint = Checkpoint.open(folder)
    model = load_model(folder, "float32")
    freeze(model)
    dense = dense_model(model, dense_family(checkpoint), checkpoint)
    windows = draw_windows(folder, read_domains(material() / "calibration"), settings)
    return Bench(folder, model, dense, windows, settings, options.out)


Found = Callable[[], Mapping[str, Tensor]]
Way = Callable[[], Found]
"""A stage; what it found is told when time and memory have been."""


def _ours(bench: Bench) -> dict[str, Way]:
    dense, settings = bench.dense, bench.settings
    calibration, affinity = bench.windows.calibration, bench.windows.affinity
    names = tuple(calibration)

    def variances() -> Found:
        stats = {name: calibrate(dense, own) for name, own in calibration.items()}
        return lambda: {
            name: torch.stack([layer.variance_F for layer in own]) for name, own in stats.items()
        }

    def by_perplexity() -> Found:
        chosen = [keep_mask(kept_LW, dense.channels) for kept_LW in bench.kept]
        width = settings.width(dense.channels)
        given = (dense, names, chosen, list(affinity.values()), width, "rows", silent)
        found = perplexity_affinity(*given)
        assert found.perplexity_MM is not None
        return lambda: {"perplexity": cast(Tensor, found.perplexity_MM)}

    def by_scores() -> Found:
        stats = [calibrate(dense, own) for own in calibration.values()]
        scores = [score_layers(settings.score, own, dense) for own in stats]
        found = score_affinity(names, scores)
        return lambda: {"correlation": found.correlation_MM}

    def assembly() -> Found:
        keep_LEW = torch.stack(bench.kept[:EXPERTS], dim=1)
        layers, groups = len(keep_LEW), tuple((name,) for name in names[:EXPERTS])
        shared_LS = torch.zeros(layers, 0, dtype=torch.int64)
        plan = ExpertPlan(keep_LEW, groups, dense.channels, shared_LS, active=settings.active)
        windows = [calibration[name] for name in names[:EXPERTS]]
        experts = layer_experts(dense, windows, plan, settings, layers, silent)
        out, checkpoint = bench.scratch / "ours", Checkpoint.open(bench.folder)
        shutil.rmtree(out, ignore_errors=True)
        write_mixture(out, "dense", checkpoint, plan, experts, None, None, settings, 2**30)
        return lambda: _tensors(out)

    return dict(zip(STAGES, (variances, by_perplexity, by_scores, assembly), strict=True))


def _twin(bench: Bench) -> dict[str, Way]:
    model, windows = bench.model, bench.windows

    def variances() -> Found:
        found = plain.variances(model, windows.calibration)
        return lambda: dict(zip(windows.calibration, found, strict=True))

    def by_perplexity() -> Found:
        found = plain.perplexities(model, bench.kept, list(windows.affinity.values()))
        return lambda: {"perplexity": found}

    def by_scores() -> Found:
        variance = plain.variances(model, windows.calibration)
        logs = torch.stack([plain.scores(model, own).clamp_min(1e-30).log() for own in variance])
        standard = (logs - logs.mean(2, keepdim=True)) / logs.std(2, keepdim=True)
        found = torch.corrcoef(standard.flatten(1))
        return lambda: {"correlation": found}

    def assembly() -> Found:
        ours = AutoModelForCausalLM.from_pretrained(bench.scratch / "ours")  # its router, by chance
        router_LED = torch.stack([layer.mlp.gate.weight.detach() for layer in ours.model.layers])
        made = plain.assembled(model, bench.kept[:EXPERTS], router_LED, ours.config)
        out = bench.scratch / "twin"
        shutil.rmtree(out, ignore_errors=True)
        made.save_pretrained(out)
        return lambda: _tensors(out)

    return dict(zip(STAGES, (variances, by_perplexity, by_scores, assembly), strict=True))


def _tensors(folder: Path) -> dict[str, Tensor]:
    checkpoint = Checkpoint.open(folder)
    return {name: checkpoint.tensor(name) for name in sorted(checkpoint.files)}


def _bars(rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for row in rows:
        if row["who"] == OURS and row["stage"].startswith("affinity"):
            faster, memory = row["times_faster"], row["times_memory"]
            yield at_least(f"{row['stage']}: times the twin's speed", faster, 3.0)
            yield at_most(f"{row['stage']}: share of the twin's memory", memory, 0.5)


def _shown(row: Mapping[str, Any]) -> list[str]:
    return [
        row["stage"],
        row["who"],
        f"{statistics.median(row['seconds']):.2f}",
        f"{row['bytes'] / 1e6:.0f}",
        f"{row['times_faster']:.2f}",
        f"{row['times_memory']:.2f}",
        f"{row['apart']:.0e}",
    ]


if __name__ == "__main__":
    main()
