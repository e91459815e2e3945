"""A hundred sites against one coordinator: its memory, the time of a round, and whether anything is lost.

    python benchmarks/load.py [--sites N …] [--megabytes 20] [--rounds 2] [--quick] [--out DIR] [--json PATH]

`pomona serve` with a LoRA of `megabytes` on the attention of `rootstock-3m`, and sites that train nothing
(`simulated_sites.py`), all on this machine over HTTP. Memory is the largest resident set of the coordinator,
less that of the same federation with a LoRA of rank 1: what updates take beyond the program, its libraries
and what it knows of every site. Nothing is lost when every round has an answer of every site and the shared
adapter is their mean. Material is found through POMONA_MODELS.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from socket import socket
from statistics import median
from typing import Any

from record import ROOT, at_most, peak_bytes, record
from safetensors.torch import load_file
from simulated_sites import STEP
from subjects import find_material

from pomona.cli.console import console, print_table
from pomona.federation.evaluation import Evaluation
from pomona.federation.settings import FederateSettings
from pomona.models.loading import load_model
from pomona.models.lora import LoRA
from pomona.recipe import dump

UPDATES = 10.0
"""How many updates a coordinator may hold at most."""
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


def main() -> None:
    options = _options()
    find_material()
    model = Path(os.environ["POMONA_MODELS"]) / "rootstock-3m"
    each = _bytes_of_rank(model)
    rank = max(2, round(options.megabytes * 1e6 / each))
    rows: list[dict[str, Any]] = []
    for sites in options.sites:
        small = _run(options.out, _settings(model, 1, options.rounds), sites)
        large = _run(options.out, _settings(model, rank, options.rounds), sites)
        memory = large["peak_bytes"] - small["peak_bytes"]
        row = {"sites": sites, "rounds": options.rounds, "update_bytes": rank * each, **large}
        row |= {"peak_of_rank_1": small["peak_bytes"], "updates_held": memory / (rank * each)}
        rows.append(row)
        record(options.json, rows, list(_bars(rows)))
    columns = ["sites", "update MB", "round s", "peak MB", "rank 1 MB", "updates held", "lost"]
    print_table("one coordinator", columns, [_shown(row) for row in rows])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sites", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--megabytes", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="three sites, one megabyte")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/load")
    parser.add_argument("--json", type=Path, help="default: results/load.json beside this file")
    options = parser.parse_args()
    if options.quick:
        options.sites, options.megabytes = [3], 1.0
    results = ROOT / "benchmarks/results"
    options.json = options.json or (options.out if options.quick else results) / "load.json"
    options.out.mkdir(parents=True, exist_ok=True)
    return options


def _settings(model: Path, rank: int, rounds: int) -> FederateSettings:
    return FederateSettings(
        model=str(model.resolve()),
        name="load",
        rounds=rounds,
        adapter=LoRA(rank, float(rank), targets=TARGETS),
        evaluation=Evaluation(every=rounds),
    )


def _bytes_of_rank(model: Path) -> int:
    """Return how many bytes of float32 every rank of the adapter takes."""
    layers = load_model(str(model)).named_modules()
    found = [own for name, own in layers if name.rpartition(".")[2] in TARGETS]
    return 4 * sum(own.in_features + own.out_features for own in found)


def _run(out: Path, settings: FederateSettings, sites: int) -> dict[str, Any]:
    """Run a federation in processes of their own and return what it took, and whether all is there."""
    folder, names = out / "federation", [f"site-{number:03}" for number in range(sites)]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "recipe.toml").write_text(dump(settings), "utf-8")
    with socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["--insecure", "--port", str(port), "--deadline", "3600", "--quorum", "1"]
    words += [word for name in names for word in ("--site", name)]
    serve = [sys.executable, "-m", "pomona", "serve", str(folder / "recipe.toml")]
    console.print(f"{sites} sites, a LoRA of rank {settings.adapter.rank}")
    with (folder / "serve.txt").open("w") as said:
        coordinator = subprocess.Popen(
            [*serve, "--out", str(folder / "run"), *words], stdout=said, stderr=said
        )
    others = [sys.executable, str(Path(__file__).with_name("simulated_sites.py")), str(port)]
    simulated = subprocess.Popen([*others, *names])
    peak = 0
    try:
        while coordinator.poll() is None:
            with suppress(OSError, ValueError):  # it may just have ended
                peak = max(peak, peak_bytes(coordinator.pid))
            with suppress(subprocess.TimeoutExpired):
                coordinator.wait(0.2)
    finally:
        for process in (coordinator, simulated):
            process.terminate()
            process.wait(60)
    if coordinator.returncode:
        raise RuntimeError((folder / "serve.txt").read_text("utf-8")[-3000:])
    return {"peak_bytes": peak, **_found(folder / "run", names, settings.rounds)}


def _found(run: Path, names: Sequence[str], rounds: int) -> dict[str, Any]:
    """Return every round's seconds, and how many answers are missing or not in the mean."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    answered = sum(line["model"] == "training" for line in lines)
    mean = STEP * rounds * (len(names) + 1) / 2  # B begins with zeros
    shared = load_file(run / "shared/adapter_model.safetensors")
    apart = max(
        float((own.double() - mean).abs().max()) for name, own in shared.items() if "lora_B" in name
    )
    times = (run / "timings.jsonl").read_text("utf-8").splitlines()
    return {
        "round_seconds": [json.loads(line)["training"] for line in times],
        "lost": len(names) * rounds - answered,
        "apart": apart / mean,
    }


def _bars(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for row in rows:
        of = f"{row['sites']} sites"
        yield at_most(f"{of}: memory in updates", row["updates_held"], UPDATES)
        yield at_most(f"{of}: answers lost", row["lost"], 0)
        yield at_most(f"{of}: the mean is off by, relative", row["apart"], 1e-4)


def _shown(row: dict[str, Any]) -> list[str]:
    megabytes = [f"{row[key] / 1e6:.1f}" for key in ("peak_bytes", "peak_of_rank_1")]
    seconds = median(row["round_seconds"])
    held = f"{row['updates_held']:.1f}"
    size = f"{row['update_bytes'] / 1e6:.1f}"
    return [str(row["sites"]), size, f"{seconds:.1f}", *megabytes, held, str(row["lost"])]


if __name__ == "__main__":
    main()
