"""What a round across sites takes beside the work: Pomona's and that of Flower's own deployment.

    python benchmarks/deploy.py [--sites 2] [--rounds 10] [--quick] [--out DIR] [--json PATH]

On one machine over HTTP, one after the other: rounds of an empty app under `flower-superlink` and
`flower-supernode`; the same app when it loads the model first, as one that trains has to, since Flower starts
a new process for every message; `pomona serve` and `pomona join` with the Mixtral of 24 million random weights,
where every site trains one step on one short row, which is part of Pomona's seconds. The first round, which
starts what stays warm, is told apart. Material is found through POMONA_DATA and POMONA_MODELS.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any

from peers.flower_deployment import rounds_of_nothing
from peers.flower_loop import free_port
from record import ROOT, at_most, record
from subjects import find_material, material, wide_vocabulary

from pomona.cli.console import print_table
from pomona.federation.evaluation import Evaluation
from pomona.federation.graft import Graft
from pomona.federation.local import LocalTraining
from pomona.federation.settings import FederateSettings
from pomona.models.lora import LoRA
from pomona.recipe import dump

MORE = 1.0
"""Seconds that a round may take more than Flower's of an empty app."""
EMPTY, LOADING, POMONA = "Flower, empty app", "Flower, app that loads the model", "Pomona"


def main() -> None:
    options = _options()
    find_material()
    model = wide_vocabulary(options.out)
    rows: list[dict[str, Any]] = []
    for name, given in (
        (EMPTY, lambda: rounds_of_nothing(options.sites, options.rounds)),
        (LOADING, lambda: rounds_of_nothing(options.sites, options.rounds, model.resolve())),
        (POMONA, lambda: _rounds_of_pomona(options, model.resolve())),
    ):
        seconds = given()
        rows.append({"way": name, "sites": options.sites, "round_seconds": seconds})
        print_table("rounds across sites, s", ["way", "first", "median"], [_shown(rows[-1])])
    record(options.json, rows, list(_bars(rows)))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sites", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="three rounds")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/deploy")
    parser.add_argument("--json", type=Path, help="default: results/deploy.json beside this file")
    options = parser.parse_args()
    options.rounds = 3 if options.quick else options.rounds
    results = ROOT / "benchmarks/results"
    options.json = options.json or (options.out if options.quick else results) / "deploy.json"
    options.out.mkdir(parents=True, exist_ok=True)
    return options


def _rounds_of_pomona(options: argparse.Namespace, model: Path) -> list[float]:
    """Run a coordinator and sites in processes of their own and return every round's seconds."""
    folder, port = options.out / "federation", free_port()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    names = [f"site-{number}" for number in range(options.sites)]
    settings = FederateSettings(
        model=str(model),
        rounds=options.rounds,
        max_length=64,
        adapter=LoRA(8, 16.0),
        graft=Graft(rank=8),
        local=LocalTraining(steps=1, batch=1),
        evaluation=Evaluation(every=options.rounds, rows=1, answers=0, new_tokens=1),
    )
    (folder / "recipe.toml").write_text(dump(settings), "utf-8")
    every = (material() / "dolly-15k/train.jsonl").read_text("utf-8").splitlines()
    with ExitStack() as running:
        where = ["--out", str(folder / "run"), "--port", str(port), "--insecure"]
        where += [word for name in names for word in ("--site", name)]
        serve = ["serve", str(folder / "recipe.toml"), *where]
        coordinator = running.enter_context(_running(folder, "serve", serve))
        for i, name in enumerate(names):
            own = every[i : 8 * len(names) : len(names)]
            (folder / f"{name}.jsonl").write_text("\n".join(own), "utf-8")
            words = ["join", "--coordinator", f"127.0.0.1:{port}", "--insecure", "--name", name]
            words += ["--data", str(folder / f"{name}.jsonl"), "--model", str(model)]
            words += ["--state", str(folder / name)]
            running.enter_context(_running(folder, name, words))
        if coordinator.wait():
            raise RuntimeError((folder / "serve.txt").read_text("utf-8")[-3000:])
    times = (folder / "run/timings.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line)["training"] for line in times]


@contextmanager
def _running(folder: Path, name: str, words: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    with (folder / f"{name}.txt").open("w") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "pomona", *words], stdout=said, stderr=said
        )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            process.terminate()
        process.wait(60)


def _bars(rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    seconds = {row["way"]: median(row["round_seconds"][1:]) for row in rows}
    more = seconds[POMONA] - seconds[EMPTY]
    yield at_most("a round takes more than Flower's empty one, s", more, MORE)


def _shown(row: Mapping[str, Any]) -> list[str]:
    first, *others = row["round_seconds"]
    return [row["way"], f"{first:.2f}", f"{median(others):.2f}"]


if __name__ == "__main__":
    main()
