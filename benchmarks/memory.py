"""What an offloaded reconstruction holds in memory at most, beside the size of its checkpoint.

    python benchmarks/memory.py [--gigabytes 4] [--out runs/memory] [--json PATH]

Writes a randomly initialised Llama of that size (bfloat16), reconstructs it with `pomona reconstruct
--offload --layers-at-once 32` in a process of its own and compares that process's largest resident set with
the checkpoint's size; then tells, from shapes alone, what a model of 8 B and one of 70 B would need, and
retraining the former.
Needs two to three times the size on disk, and the tokenizer of `rootstock-3m` (POMONA_MODELS).
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from time import monotonic, sleep

import torch
from record import ROOT, below, peak_bytes, record
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from pomona.cli.console import console, print_table
from pomona.files import write_text
from pomona.models.dense import DENSE_FAMILIES
from pomona.models.placement import Placement
from pomona.models.weights import Checkpoint, write_sharded
from pomona.pipelines.reconstruct import ReconstructSettings
from pomona.recipe import dump
from pomona.recipe.reconstruct import ReconstructRecipe
from pomona.reconstruction.estimate import estimate
from pomona.reconstruction.retraining import Retraining
from pomona.reconstruction.specialise import Specialise

AT_ONCE = 32
SETTINGS = ReconstructSettings(
    windows=2, length=16, affinity="scores", specialise=Specialise(rounds=1, sweeps=1)
)
WIDE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
}
LLAMA_8B = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_key_value_heads=8,
    vocab_size=128256,
)
LLAMA_70B = LlamaConfig(
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    vocab_size=128256,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=4.0, help="of the dense checkpoint")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "memory")
    parser.add_argument(
        "--json", type=Path, default=ROOT / "benchmarks" / "results" / "memory.json"
    )
    options = parser.parse_args()
    shutil.rmtree(options.out, ignore_errors=True)
    options.out.mkdir(parents=True)
    dense, mixture = options.out / "dense", options.out / "mixture"
    size = _write_dense(dense, options.gigabytes)
    _write_domains(options.out / "domains")
    began = monotonic()
    peak = _run(_command(options.out))
    seconds = monotonic() - began
    made = sum(file.stat().st_size for file in mixture.glob("*.safetensors"))
    rows = [
        {"what": "dense checkpoint", "bytes": size},
        {"what": "mixture", "bytes": made},
        {"what": "largest resident set", "bytes": peak, "seconds": seconds},
        {"what": "estimated, of that", "bytes": _estimated(dense)},
        *_on_paper(),
    ]
    shown = [[str(row["what"]), f"{int(row['bytes']) / 2**30:.2f}"] for row in rows]
    print_table("memory", ["what", "GiB"], shown)
    record(
        options.json, rows, [below("largest resident set below the checkpoint's size", peak, size)]
    )
    shutil.rmtree(options.out)


def _run(command: list[str]) -> int:
    """Run a program to its end; return the largest resident set it had, looked at ten times a second."""
    peak = 0
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            with suppress(
                OSError, ValueError
            ):  # ended since it was asked: a dead process has no memory
                peak = peak_bytes(process.pid)
            sleep(0.1)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return peak


def _command(out: Path) -> list[str]:
    recipe = ReconstructRecipe(str(out / "dense"), out / "domains", settings=SETTINGS)
    (out / "recipe.toml").write_text(dump(recipe), encoding="utf-8")
    given = ["--recipe", out / "recipe.toml", "--out", out / "mixture", "--offload"]
    program = [sys.executable, "-m", "pomona", "reconstruct"]
    return [*program, *map(str, given), "--layers-at-once", str(AT_ONCE)]


def _write_dense(folder: Path, gigabytes: float) -> int:
    """Write the checkpoint tensor by tensor; return its bytes."""
    layer = 2 * sum(shape[0] * shape[-1] for name, shape in _shapes(1) if ".layers.0." in name)
    layers = round(gigabytes * 1e9 / layer)
    source = (
        Path(os.environ.get("POMONA_MODELS", ROOT.parent / "shared" / "models")) / "rootstock-3m"
    )
    folder.mkdir()
    config = LlamaConfig(num_hidden_layers=layers, **_config(source))
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, folder / name)
    return write_sharded(folder, _random(layers))


def _config(source: Path) -> dict:
    small = json.loads((source / "config.json").read_text())
    same = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")
    return {**{key: small[key] for key in same}, **WIDE, "tie_word_embeddings": True}


def _shapes(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    source = (
        Path(os.environ.get("POMONA_MODELS", ROOT.parent / "shared" / "models")) / "rootstock-3m"
    )
    yield from _shapes_of(LlamaConfig(num_hidden_layers=layers, **_config(source))).items()


def _shapes_of(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: tuple(weight.shape) for name, weight in model.named_parameters()}


def _random(layers: int) -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for name, shape in _shapes(layers):
        if len(shape) == 1:
            yield name, torch.ones(shape, dtype=torch.bfloat16)
        else:
            yield name, (torch.randn(shape, generator=generator) * 0.02).bfloat16()


def _write_domains(folder: Path) -> None:
    folder.mkdir()
    words = random.Random(0)
    for domain in range(8):
        text = " ".join(f"word{words.randrange(500)}" for _ in range(2000))
        write_text(folder / f"domain{domain}.jsonl", json.dumps({"text": text}) + "\n")


def _estimated(dense: Path) -> int:
    checkpoint = Checkpoint.open(dense)
    shapes = {name: checkpoint.shape(name) for name in checkpoint.files}
    family, placement = DENSE_FAMILIES["llama"], Placement(offload=True, layers=AT_ONCE)
    return estimate(shapes, family, SETTINGS, 8, placement).peak_bytes


def _on_paper() -> Iterator[dict[str, object]]:
    settings = ReconstructSettings(dtype="bfloat16")
    for name, config in (("8 B", LLAMA_8B), ("70 B", LLAMA_70B)):
        shapes = _shapes_of(config)
        size = 2 * sum(torch.Size(shape).numel() for shape in shapes.values())
        yield {"what": f"{name}: dense checkpoint, on paper", "bytes": size}
        for placement in (Placement(layers=4), Placement(offload=True, layers=1)):
            told = estimate(shapes, DENSE_FAMILIES["llama"], settings, 8, placement)
            where = "offloaded, layer by layer" if placement.offload else "4 layers at once"
            yield {"what": f"{name}: {where}, on paper", "bytes": told.peak_bytes}
    shapes, offloaded = _shapes_of(LLAMA_8B), Placement(offload=True)
    for where, checkpointing in (("", False), (" with checkpointing", True)):
        how = Retraining(dtype="bfloat16", checkpointing=checkpointing)
        own = replace(settings, retrain=how)
        told = estimate(shapes, DENSE_FAMILIES["llama"], own, 8, offloaded)
        yield {"what": f"8 B: retrained{where}, on paper", "bytes": told.peak_bytes}


if __name__ == "__main__":
    main()
    console.print("every row is in the JSON")
