"""Open a model and its tokenizer as transformers does, with a sentence for whatever is wrong."""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from pomona.errors import PomonaError
from pomona.files import read_object
from pomona.models.weights import Checkpoint

Dtype = Literal["auto", "float32", "bfloat16"]
Load: TypeAlias = Callable[[str, Dtype], PreTrainedModel]
"""Loads a model from a folder or a Hub id."""


def load_model(source: str | Path, dtype: Dtype = "auto") -> PreTrainedModel:
    """Load a causal language model from a folder or a Hub id: safetensors only, no remote code.

    Raises `PomonaError` naming the folder, file or tensor that is missing, damaged or one too many.
    """
    folder = checkpoint_folder(source)
    config = Checkpoint.open(folder).config  # every file first: transformers' errors do not name it
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # told below, by name
            output_loading_info=True,
        )
    except StrictDataclassError as error:  # a field of config.json has the wrong type
        raise _wrong_config(source, error) from error
    except Exception as error:  # whatever a config says, its family fails in a way of its own
        raise PomonaError(f"cannot load a model from {source}: {_why(error, config)}") from error
    model, found = cast(tuple[PreTrainedModel, dict[str, Any]], loaded)
    _check_complete(source, found)
    return model


def outline_model(
    source: str | Path, dtype: Dtype = "auto", buffers: bool = False
) -> PreTrainedModel:
    """Return a checkpoint's model on the meta device: every module and shape, no weight.

    With `buffers` what is computed from the config alone (rotary frequencies) is there. A folder with
    config.json alone is enough, and of a Hub id no other file is fetched. Raises `PomonaError` as
    `load_model` does.
    """
    folder = _config_folder(source)
    config = read_object(folder / "config.json")
    try:
        made = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
        kind = (made.dtype or torch.float32) if dtype == "auto" else getattr(torch, dtype)
        with init_empty_weights(include_buffers=False) if buffers else torch.device("meta"):
            model = AutoModelForCausalLM.from_config(made, dtype=kind, trust_remote_code=False)
        model.tie_weights()  # what is registered as empty is a parameter of its own
    except StrictDataclassError as error:
        raise _wrong_config(source, error) from error
    except Exception as error:  # as above
        raise PomonaError(
            f"cannot make out the model of {source}: {_why(error, config)}"
        ) from error
    return cast(PreTrainedModel, model)


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder or Hub id; raises `PomonaError` when there is none."""
    folder = checkpoint_folder(source)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            read_object(folder / name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # the parsers of tokenizer files raise whatever they stumble over
        raise PomonaError(
            f"cannot load a tokenizer from {source}: {_first_line(error)}; its folder needs a whole "
            "tokenizer.json (or the family's own files) and tokenizer_config.json"
        ) from error
    if tokenizer.eos_token_id is None:
        raise PomonaError(
            f"the tokenizer of {source} has no end-of-sequence token; set eos_token in its "
            "tokenizer_config.json, answers could not end otherwise"
        )
    return cast(PreTrainedTokenizerBase, tokenizer)


def outline_checkpoint(source: str | Path) -> Checkpoint:
    """Return a checkpoint of which its config alone is known; of a Hub id no other file is fetched.

    Raises `PomonaError` where there is no config.json.
    """
    folder = _config_folder(source)
    return Checkpoint(folder, read_object(folder / "config.json"), {})


def checkpoint_folder(model: str | Path) -> Path:
    """Return a local folder of a checkpoint; a Hub id is downloaded, safetensors only.

    Raises `PomonaError` when `model` is neither.
    """
    wanted = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
    return _fetched(model, wanted, ["consolidated*", "original/*"])  # the same weights once more


def _config_folder(model: str | Path) -> Path:
    """Return a local folder with a model's config.json, of a Hub id nothing else."""
    folder = _fetched(model, ["config.json"], [])
    if not (folder / "config.json").is_file():
        raise PomonaError(f"{folder} is no checkpoint folder: it holds no config.json")
    return folder


def _fetched(model: str | Path, wanted: list[str], unwanted: list[str]) -> Path:
    folder = Path(model)
    if folder.is_dir():
        return folder
    if folder.is_absolute() or str(model).startswith((".", "~")) or str(model).count("/") > 1:
        raise PomonaError(f"{model} is not a folder; give a checkpoint folder or a Hub id")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(model), allow_patterns=wanted, ignore_patterns=unwanted))
    except Exception as error:
        raise PomonaError(
            f"{model} is not a folder, and as a Hub id it cannot be fetched "
            f"({_first_line(error)}); check the path or the id"
        ) from error


def context_length(model: PreTrainedModel) -> int:
    """Return the longest sequence the model was made for; unlimited where its config is silent."""
    config = model.config.get_text_config()
    return int(getattr(config, "max_position_embeddings", 1 << 30))


def _check_complete(source: str | Path, found: Mapping[str, Any]) -> None:
    """Refuse what transformers would fill with random weights, or leave out, with a mere warning.

    What a family tells transformers to pass over (old rotary buffers, heads for several tokens) is in
    none of these lists.
    """
    missing, mismatched = sorted(found["missing_keys"]), sorted(map(str, found["mismatched_keys"]))
    unexpected = sorted(found["unexpected_keys"])
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
    if unexpected:
        raise PomonaError(
            f'{source} holds the tensor "{unexpected[0]}", which the model of its config.json does not '
            f"have ({len(unexpected)} such tensors); repair config.json, or take the checkpoint it is of"
        )


def check_tensors(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint that does not have the tensors of an outlined model, one by one and no more."""
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    passed_over = model._keys_to_ignore_on_load_unexpected or ()  # pyright: ignore
    found = {
        "missing_keys": shapes.keys() - checkpoint.files.keys(),
        "mismatched_keys": [
            (name, checkpoint.shape(name), shape)
            for name, shape in shapes.items()
            if name in checkpoint.files and checkpoint.shape(name) != shape
        ],
        "unexpected_keys": [
            name
            for name in checkpoint.files.keys() - model.state_dict().keys()
            if not any(re.search(pattern, name) for pattern in passed_over)
        ],
    }
    _check_complete(checkpoint.folder, found)


def _wrong_config(source: str | Path, error: Exception) -> PomonaError:
    told = " ".join(str(error).split())
    return PomonaError(f"{source}: config.json is wrong: {told}; repair it")


def _why(error: Exception, config: Mapping[str, Any]) -> str:
    """Say what config.json has to do with it: an unknown name comes back as a bare `KeyError`."""
    name = error.args[0] if isinstance(error, KeyError) and error.args else None
    key = None if name is None else next((k for k, v in _entries(config) if v == name), None)
    if key is not None:
        return f'its config.json says {key} = "{name}", which is unknown; repair config.json'
    return f"{_first_line(error)}; check its config.json"


def _entries(table: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield every key of nested tables with its value."""
    for key, value in table.items():
        yield key, value
        if isinstance(value, dict):
            yield from _entries(cast(dict[str, Any], value))


def _first_line(error: Exception) -> str:
    """Return the first line of a library's error as the middle of a sentence."""
    lines = str(error).strip().splitlines()
    line = lines[0].rstrip(" .:;,").removesuffix(" from one of") if lines else type(error).__name__
    return f"there is no {line}" if isinstance(error, KeyError) else line
