"""Open a model and its tokenizer as transformers does, with a sentence for whatever is wrong."""

from pathlib import Path
from typing import Literal, cast

from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from pomona.errors import PomonaError
from pomona.models.weights import Checkpoint

Dtype = Literal["auto", "float32", "bfloat16"]


def load_model(source: str | Path, dtype: Dtype = "auto") -> PreTrainedModel:
    """Load a causal language model from a folder or a Hub id: safetensors only, no remote code.

    Raises `PomonaError` naming the folder or the file that is missing or damaged.
    """
    _check_folder(source)
    try:
        return AutoModelForCausalLM.from_pretrained(
            str(source), dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise PomonaError(f"cannot load a model from {source}: {_first_line(error)}") from error


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder or Hub id; raises `PomonaError` when there is none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise PomonaError(f"cannot load a tokenizer from {source}: {_first_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise PomonaError(
            f"the tokenizer of {source} has no end-of-sequence token; set eos_token in its "
            "tokenizer_config.json, answers could not end otherwise"
        )
    return cast(PreTrainedTokenizerBase, tokenizer)


def context_length(model: PreTrainedModel) -> int:
    """Return the longest sequence the model was made for; unlimited where its config is silent."""
    config = model.config.get_text_config()
    return int(getattr(config, "max_position_embeddings", 1 << 30))


def _check_folder(source: str | Path) -> None:
    """Look at every file of a local checkpoint first: transformers' own errors do not name it."""
    folder = Path(source)
    if folder.is_dir():
        Checkpoint.open(folder)
    elif folder.is_absolute() or str(source).startswith(".") or str(source).count("/") > 1:
        raise PomonaError(f"{source} is not a folder; give a checkpoint folder or a Hub id")


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
