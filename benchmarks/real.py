"""The main job on real material: a dense model to a mixture to personal models.

    python benchmarks/real.py [--quick] [--out runs/real] [--json PATH]

Reconstructs `rootstock-3m` from ten calibration domains, then federates the mixture over four Dolly
clients with FedAvg, local-only (without and with the graft) and FLEx, three seeds each; then the same
directly on a tiny random Qwen2-MoE, whose experts have a shared expert beside them. Material is found
through POMONA_DATA and POMONA_MODELS. Interrupted, it goes on where it was.
"""

import argparse
import os
import sys
from pathlib import Path

import torch
from record import comparison_rows, lower_loss, record
from transformers import AutoTokenizer, Qwen2MoeConfig, Qwen2MoeForCausalLM

from pomona.artifacts.personal import PersonalModel
from pomona.artifacts.report import write_report
from pomona.artifacts.run import RunDirectory
from pomona.artifacts.table import load_runs
from pomona.cli.console import console, print_comparison, progress_bars
from pomona.data.texts import read_domains
from pomona.evaluate import on_text
from pomona.federate import federate
from pomona.federation.settings import FederateSettings
from pomona.progress import titled
from pomona.recipe import dump, read_recipe
from pomona.reconstruct import ReconstructSettings, reconstruct

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("local-only", "local-only-graft", "fedavg", "flex")


def main() -> None:
    options = _options()
    os.environ.setdefault("POMONA_DATA", str(ROOT.parent / "shared" / "data"))
    os.environ.setdefault("POMONA_MODELS", str(ROOT.parent / "shared" / "models"))
    torch.set_num_threads(2)
    out: Path = options.out
    text = _reconstructed(out, options.quick)
    seeds = (0,) if options.quick else (0, 1, 2)
    rounds = 4 if options.quick else 20
    tables = {
        "rootstock-3m": _federated(out / "rootstock", out / "mixture", METHODS, seeds, rounds),
        "random Qwen2-MoE": _federated(
            out / "qwen2-moe", _random_qwen2_moe(out), ("fedavg", "flex"), seeds[:1], rounds
        ),
    }
    _write(options, text, tables)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one seed, four rounds, fewer windows")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "real")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "real.json")
    return parser.parse_args()


def _reconstructed(out: Path, quick: bool) -> dict[str, dict[str, float]]:
    """Make the mixture and return held-out loss per domain, dense beside mixture."""
    data = Path(os.environ["POMONA_DATA"]) / "calibration"
    dense = Path(os.environ["POMONA_MODELS"]) / "rootstock-3m"
    mixture = out / "mixture"
    if not mixture.exists():
        settings = ReconstructSettings(windows=32 if quick else 128, affinity_windows=8)
        with progress_bars() as progress:
            console.print(str(reconstruct(dense, read_domains(data), mixture, settings, progress)))
    return {
        name: {domain: own["loss"] for domain, own in _held_out(path, data).items()}
        for name, path in (("dense", dense), ("mixture", mixture))
    }


def _held_out(model: Path, data: Path) -> dict[str, dict[str, float]]:
    return on_text(PersonalModel(str(model)), str(data), [256], 32)[256].figures


def _random_qwen2_moe(out: Path) -> Path:
    """Save a small random mixture with a gated shared expert and rootstock's tokenizer."""
    folder = out / "qwen2-moe-model"
    if not folder.exists():
        tokenizer = AutoTokenizer.from_pretrained(
            Path(os.environ["POMONA_MODELS"]) / "rootstock-3m"
        )
        torch.manual_seed(0)
        config = Qwen2MoeConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=64,
            shared_expert_intermediate_size=128,
            max_position_embeddings=1024,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        Qwen2MoeForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def _federated(
    out: Path, model: Path, methods: tuple[str, ...], seeds: tuple[int, ...], rounds: int
) -> list[Path]:
    runs: list[Path] = []
    for seed in seeds:
        for method in methods:
            given = {"model": str(model.resolve()), "seed": seed, "rounds": rounds}
            settings = read_recipe(ROOT / "recipes" / f"{method}.toml", FederateSettings, given)
            runs.append(out / f"{method}-{seed}")
            about = {"command": sys.argv, "method": method, "seed": seed}
            with RunDirectory.open(runs[-1], dump(settings), about) as run:
                with progress_bars() as progress:
                    federate(settings, run, titled(f"{method} {seed}", progress))
    write_report(runs, out / "report.html")
    console.print(f"{model}: {out / 'report.html'}")
    print_comparison(runs)
    return runs


def _write(options: argparse.Namespace, text: object, tables: dict[str, list[Path]]) -> None:
    main_runs = load_runs(tables["rootstock-3m"])
    pairs = [("flex", other) for other in ("base", "fedavg", "local-only", "local-only-graft")]
    record(
        options.json,
        {name: comparison_rows(load_runs(paths)) for name, paths in tables.items()},
        lower_loss(main_runs, pairs),
        heldout_nats_per_token=text,
    )


if __name__ == "__main__":
    main()
