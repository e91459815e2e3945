"""The models that benchmarks work on: made once in a folder, of the material beside the project."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from record import ROOT
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerBase,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from pomona.cli.console import progress_bars
from pomona.data.rows import read_rows
from pomona.data.texts import read_domains
from pomona.files import atomic_folder
from pomona.models.loading import Dtype, load_tokenizer
from pomona.models.placement import find_device
from pomona.pipelines.reconstruct import ReconstructSettings, reconstruct
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
        **_ends(tokenizer),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MixtralForCausalLM(config)
    with atomic_folder(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    return folder


def qwen_moe(out: Path) -> Path:
    """Make Qwen1.5-MoE-A2.7B's shapes with random weights in bfloat16: 14.3 billion, 29 GB on disk.

    Its tokenizer is that of `wide_vocabulary`, whose 32,000 pieces are the first of its 151,936.
    """
    folder = out / "qwen1.5-moe-a2.7b"
    if folder.exists():
        return folder
    tokenizer = load_tokenizer(wide_vocabulary(out))
    config = Qwen2MoeConfig(
        vocab_size=151_936,
        hidden_size=2048,
        intermediate_size=5632,
        moe_intermediate_size=1408,
        shared_expert_intermediate_size=5632,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=16,
        num_experts=60,
        num_experts_per_tok=4,
        max_position_embeddings=8192,
        dtype="bfloat16",
        **_ends(tokenizer),
    )
    with torch.random.fork_rng(), find_device("auto"):
        torch.manual_seed(0)
        model = Qwen2MoeForCausalLM._from_config(config, dtype=torch.bfloat16)
    with atomic_folder(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    return folder


@dataclass(frozen=True)
class Subject:
    """A model to work on: what makes it in a folder, and the type it computes in; `large` ones want a GPU."""

    make: Callable[[Path], Path]
    dtype: Dtype = "float32"
    large: bool = False


SUBJECTS = {
    "rootstock-3m": Subject(rootstock),
    "mixtral-24m": Subject(wide_vocabulary),
    "qwen1.5-moe-a2.7b": Subject(qwen_moe, "bfloat16", large=True),
}
"""The subjects of the benchmarks of speed, by name."""
SMALL = [name for name, subject in SUBJECTS.items() if not subject.large]


def _ends(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<{which}>") for name, which in ENDS
    }


def _tokenizer() -> PreTrainedTokenizerBase:
    """Train the tokenizer of `rootstock-3m` anew on Dolly and the calibration texts, with more pieces."""
    rows = read_rows(material() / "dolly-15k" / "train.jsonl")
    texts = [f"{row.instruction}\n{row.context}\n{row.response}" for row in rows]
    texts += [text for own in read_domains(material() / "calibration").values() for text in own]
    known = load_tokenizer(Path(os.environ["POMONA_MODELS"]) / "rootstock-3m")
    return cast(Any, known).train_new_from_iterator(texts, WORDS)
