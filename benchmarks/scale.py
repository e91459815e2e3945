"""What clients cost: rounds, start-up and memory against their number, tokens per second against the cohort.

    python benchmarks/scale.py [--clients N …] [--cohorts C …] [--sampled 10] [--rounds 3] [--threads 2]
                               [--out DIR] [--json PATH] [--quick]

First `recipes/flex.toml` on `rootstock-3m` made into a mixture, with N clients of four Dolly rows each in files
of their own, of whom `sampled` take part in a round: a process for every N, with its largest resident set when
the rounds begin, when they are over and at the end, when every client has been tested and its folder written.
Then C clients of one step of two rows, in one cohort. Rows are cut to 128 tokens. `--quick`: 10 and 100
clients, cohorts of up to 8.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from record import ROOT, at_most, peak_bytes, record, timed
from rounds import trained_round, work_of
from subjects import find_material, material, rootstock

from pomona.artifacts.figures import svg
from pomona.artifacts.run import RunDirectory
from pomona.cli.console import print_table
from pomona.federation.clients import ClientData
from pomona.federation.settings import FederateSettings
from pomona.files import atomic_folder, write_text
from pomona.pipelines.federate import federate
from pomona.recipe import dump, read_recipe

LENGTH, ROWS = 128, 4


def main() -> None:
    options = _options()
    find_material()
    torch.set_num_threads(options.threads)
    if options.child:
        print(json.dumps(_run(options, options.child)))
        return
    rootstock(options.out)
    rows = [_in_a_process(options, clients) for clients in options.clients]
    cohorts = list(_cohorts(options.out, options.cohorts))
    print_table(
        f"{options.sampled} clients in a round",
        ["clients", "start-up s", "rounds a minute", "MB at start", "after rounds", "at the end"],
        [_shown(row) for row in rows],
    )
    print_table(
        "cohorts",
        ["clients at once", "tokens per second"],
        [[str(row["cohort"]), f"{row['tokens_per_second']:.0f}"] for row in cohorts],
    )
    record(options.json, rows, list(_bars(rows)), cohorts=cohorts, threads=options.threads)
    write_text(options.json.with_suffix(".svg"), _plot(rows, cohorts))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100, 1000, 10_000])
    parser.add_argument("--cohorts", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128])
    parser.add_argument("--sampled", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="few clients, small cohorts")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "federate")
    parser.add_argument("--json", type=Path, help="default: results/scale.json beside this file")
    options = parser.parse_args()
    if options.quick:
        options.clients, options.cohorts = [10, 100], [1, 2, 4, 8]
    kept = ROOT / "benchmarks" / "results" / "scale.json"
    options.json = options.json or (options.out / "scale-quick.json" if options.quick else kept)
    return options


def _in_a_process(options: argparse.Namespace, clients: int) -> dict[str, Any]:
    given = ["--child", clients, "--sampled", options.sampled, "--rounds", options.rounds]
    given += ["--threads", options.threads, "--out", options.out]
    command = [sys.executable, __file__, *map(str, given)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _run(options: argparse.Namespace, clients: int) -> dict[str, Any]:
    """Run a federation and tell when its rounds began and ended, and the memory it had taken by then."""
    folder = options.out / "scale" / "run"
    shutil.rmtree(folder, ignore_errors=True)
    settings = _settings(options, clients)
    seen: list[tuple[str, float, int]] = []

    def watch(stage: str, done: int, of: int) -> None:
        if stage == "rounds" and done in (0, of):
            seen.append((stage, time.perf_counter(), peak_bytes()))

    began = time.perf_counter()
    about = {"command": ["python", *sys.argv], "method": settings.name, "seed": settings.seed}
    with RunDirectory.open(folder, dump(settings), about) as run:
        federate(settings, run, watch)
    ended = time.perf_counter()
    (_, first, at_first), *_, (_, last, at_last) = seen
    return {
        "clients": clients,
        "start_up_seconds": first - began,
        "rounds_per_minute": 60 * options.rounds / (last - first),
        "end_seconds": ended - last,
        "peak_bytes": {"start-up": at_first, "rounds": at_last, "end": peak_bytes()},
    }


def _settings(options: argparse.Namespace, clients: int) -> FederateSettings:
    given = {"model": str(rootstock(options.out).resolve()), "rounds": options.rounds}
    recipe = read_recipe(ROOT / "recipes" / "flex.toml", FederateSettings, given)
    data = ClientData(folder=_files(options.out, clients))
    evaluation = replace(
        recipe.evaluation, every=options.rounds, rows=1, answers=0, forgetting=None
    )
    return replace(
        recipe,
        data=data,
        evaluation=evaluation,
        max_length=LENGTH,
        fraction=min(1.0, options.sampled / clients),
    )


def _files(out: Path, clients: int) -> Path:
    """Write four train rows and a test row of Dolly for every client; after the last row comes the first."""
    folder = out / "scale" / f"{clients}-clients"
    if folder.exists():
        return folder
    train, test = (
        (material() / "dolly-15k" / f"{split}.jsonl").read_text("utf-8").splitlines()
        for split in ("train", "test")
    )
    with atomic_folder(folder) as partial:
        for client in range(clients):
            own = [train[(client * ROWS + k) % len(train)] for k in range(ROWS)]
            name = f"client-{client:05}"
            (partial / f"{name}.train.jsonl").write_text("\n".join(own) + "\n", "utf-8")
            (partial / f"{name}.test.jsonl").write_text(test[client % len(test)] + "\n", "utf-8")
    return folder


def _cohorts(out: Path, sizes: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Yield the tokens that C clients of two rows a step train on in a second; the median of five."""
    for size in sizes:
        work = work_of("rootstock-3m", out, size, rows=2, tokens=LENGTH, steps=1)
        go = trained_round(work)
        go()
        seconds = timed({"cohort": go}, repeats=5)["cohort"]
        tokens = sum(len(e.input_ids) for own in work.drawn() for e in own[0])
        yield {
            "cohort": size,
            "seconds": seconds,
            "tokens_per_second": tokens / statistics.median(seconds),
        }


def _bars(rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Ten thousand clients beside a hundred, and beside a thousand for the start."""
    by_clients = {row["clients"]: row for row in rows}
    most, few, some = by_clients.get(10_000), by_clients.get(100), by_clients.get(1000)
    if most and few:
        peaks = [row["peak_bytes"]["rounds"] for row in (most, few)]
        yield at_most(
            "10,000 clients: memory of the rounds ÷ that of 100", peaks[0] / peaks[1], 1.1
        )
        rates = [row["rounds_per_minute"] for row in (few, most)]
        yield at_most("10,000 clients: time of a round ÷ that of 100", rates[0] / rates[1], 1.1)
    if most and some:
        starts = [row["start_up_seconds"] for row in (most, some)]
        yield at_most("10,000 clients: start-up ÷ that of 1,000", starts[0] / starts[1], 11.0)


def _shown(row: Mapping[str, Any]) -> list[str]:
    peaks = [f"{size / 1e6:.0f}" for size in row["peak_bytes"].values()]
    return [
        f"{row['clients']:,}",
        f"{row['start_up_seconds']:.1f}",
        f"{row['rounds_per_minute']:.1f}",
        *peaks,
    ]


def _plot(rows: Sequence[Mapping[str, Any]], cohorts: Sequence[Mapping[str, Any]]) -> str:
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    clients = [row["clients"] for row in rows]
    left.plot(clients, [row["rounds_per_minute"] for row in rows], "o-", color="#c05621")
    left.set(xlabel="clients", ylabel="rounds a minute", xscale="log", ylim=0)
    for moment in ("start-up", "rounds", "end"):
        sizes = [row["peak_bytes"][moment] / 1e9 for row in rows]
        middle.plot(clients, sizes, "o-", label=moment)
    middle.set(xlabel="clients", ylabel="largest resident set so far, GB", xscale="log", ylim=0)
    middle.legend()
    sizes, rates = zip(*((row["cohort"], row["tokens_per_second"]) for row in cohorts), strict=True)
    right.plot(sizes, rates, "o-", color="#c05621")
    right.set(xlabel="clients at once", ylabel="tokens per second", xscale="log", ylim=0)
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
    return svg(figure)


if __name__ == "__main__":
    main()
