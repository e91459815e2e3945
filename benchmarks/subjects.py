"""The models that benchmarks work on: made once in a folder, of the material beside the project."""

import os
from pathlib import Path
from typing import Any, cast

import torch
from record import ROOT
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerBase

from pomona.cli.console import progress_bars
from pomona.data.rows import read_rows
from pomona.data.texts import read_domains
from pomona.files import atomic_folder
from pomona.models.loading import load_tokenizer
from pomona.reconstruct import ReconstructSettings, reconstruct
from pomona.reconstruction.retraining import ExpertStage, Retraining

WORDS = 32_000
ENDS = (("bos", "s"), ("eos", "/s"), ("pad", "pad"))


def find_material() -> None:
    """Say where data and models are, if nobody has: in `shared` beside the project."""
    for kind in ("data", "models"):
        os.environ.setdefault(f"POMONA_{kind.upper()}", str(ROOT.parent / "shared" / kind))


def material() -> Path:
    """Return the folder of real texts and rows."""
    return Path(os.environ["POMONA_DATA"])


def rootstock(out: Path) -> Path:
    """Make `rootstock-3m` into eight experts, two active: Pomona's defaults, 100,000 tokens of retraining."""
    folder = out / "mixture"
    if not folder.exists():
        dense = Path(os.environ["POMONA_MODELS"]) / "rootstock-3m"
        retrain = Retraining(experts=ExpertStage(tokens=100_000))
        settings = ReconstructSettings(
            experts=8, active=2, keep=0.25, windows=32, affinity_windows=8, retrain=retrain
        )
        with progress_bars() as progress:
            reconstruct(dense, read_domains(material() / "calibration"), folder, settings, progress)
    return folder


def wide_vocabulary(out: Path) -> Path:
    """Make a Mixtral of 24 million random weights whose tokenizer knows 32,000 pieces of the real texts."""
    folder = out / "mixtral-24m"
    if folder.exists():
        return folder
    tokenizer = _tokenizer()
    config = MixtralConfig(
        vocab_size=WORDS,
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        **{
            f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<{which}>")
            for name, which in ENDS
        },
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MixtralForCausalLM(config)
    with atomic_folder(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    return folder


SUBJECTS = {"rootstock-3m": rootstock, "mixtral-24m": wide_vocabulary}
"""What makes a subject of the benchmarks of speed in a folder, by name."""


def _tokenizer() -> PreTrainedTokenizerBase:
    """Train the tokenizer of `rootstock-3m` anew on Dolly and the calibration texts, with more pieces."""
    rows = read_rows(material() / "dolly-15k" / "train.jsonl")
    texts = [f"{row.instruction}\n{row.context}\n{row.response}" for row in rows]
    texts += [text for own in read_domains(material() / "calibration").values() for text in own]
    known = load_tokenizer(Path(os.environ["POMONA_MODELS"]) / "rootstock-3m")
    return cast(Any, known).train_new_from_iterator(texts, WORDS)
