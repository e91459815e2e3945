"""Open a model and its tokenizer as transformers does, with a sentence for whatever is wrong."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

from huggingface_hub.errors import StrictDataclassError
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


def load_model(
    source: str | Path, dtype: Dtype = "auto", placing: Mapping[str, Any] | None = None
) -> PreTrainedModel:
    """Load a causal language model from a folder or a Hub id: safetensors only, no remote code.

    `placing` goes to transformers: where the weights shall lie, if not in memory.

    Raises `PomonaError` naming the folder, file or tensor that is missing or damaged.
    """
    _check_folder(source)
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            str(source),
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # told below, by name
            output_loading_info=True,
            **(placing or {}),
        )
    except StrictDataclassError as error:  # a field of config.json has the wrong type
        told = " ".join(str(error).split())
        raise PomonaError(f"{source}: config.json is wrong: {told}; repair it") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise PomonaError(
            f"cannot load a model from {source}: {_first_line(error)}; check the name and its config.json"
        ) from error
    model, found = cast(tuple[PreTrainedModel, dict[str, Any]], loaded)
    _check_complete(source, found)
    return model


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


def checkpoint_folder(model: str | Path) -> Path:
    """Return a local folder of a checkpoint; a Hub id is downloaded, safetensors only.

    Raises `PomonaError` when `model` is neither.
    """
    folder = Path(model)
    if folder.is_dir():
        return folder
    if folder.is_absolute() or str(model).startswith(".") or str(model).count("/") != 1:
        raise PomonaError(f"{model} is not a folder; give a checkpoint folder or a Hub id")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                str(model),
                allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"],
            )
        )
    except Exception as error:
        raise PomonaError(
            f"{model} is no folder here and cannot be fetched from the Hub: {str(error).splitlines()[0]}"
        ) from error


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


def _check_complete(source: str | Path, found: Mapping[str, Any]) -> None:
    """Refuse what transformers would fill with random weights and a mere warning."""
    missing, mismatched = sorted(found["missing_keys"]), sorted(map(str, found["mismatched_keys"]))
    if missing:
        raise PomonaError(
            f'{source} lacks the tensor "{missing[0]}" ({len(missing)} missing in all); the '
            "checkpoint is incomplete, copy or download it again"
        )
    if mismatched:
        raise PomonaError(
            f"{source}: the shape of {mismatched[0]} is not what its config.json says "
            f"({len(mismatched)} such tensors); repair config.json"
        )


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
