"""The demo over three seeds, beside the opponent it does not show: alone, with the same graft.

    python benchmarks/demo.py [--quick] [--out runs/demo-seeds] [--json PATH]

Interrupted, it goes on where it was. `--quick` takes one seed.
"""

import argparse
from pathlib import Path

import torch
from record import ROOT, comparison_rows, lower_loss, record

from pomona.artifacts.table import load_runs
from pomona.cli.console import print_comparison, progress_bars
from pomona.demo.story import METHODS, tell


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    runs: list[Path] = []
    with progress_bars() as progress:
        for seed in (0,) if options.quick else (0, 1, 2):
            runs += tell(options.out, seed, progress, tuple(METHODS))[0]
    print_comparison(runs)
    finished = load_runs(runs)
    pairs = [("FLEx", other) for other in ("base", "FedAvg", "local-only", "local-only + graft")]
    record(options.json, comparison_rows(finished), lower_loss(finished, pairs))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one seed")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "demo-seeds")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "demo.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
