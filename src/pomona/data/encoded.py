"""Rows as tokens, encoded once: kept on disk under a digest of what they were made of, mapped into memory.

Hundreds of thousands of rows then take no memory but for those in use, and a run whose texts and tokenizer
were seen before encodes nothing.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import overload

import torch
from jaxtyping import Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pomona.data.examples import Example, Texts, examples_of, texts_of
from pomona.data.row import Row
from pomona.data.templates import Template

_AT_ONCE = 4096
_MAKERS = ("pomona", "transformers", "tokenizers")  # another version may encode otherwise


@dataclass(frozen=True)
class Encoded(Sequence[Example]):
    """Some of the rows of one store, as examples that are made when they are asked for.

    ids: the tokens of all rows one after another; ends and prompts: where each row ends, and how long its
    prompt is. `chosen` are the numbers of the rows that these are.
    """

    ids: Int[Tensor, " N"] = field(repr=False)
    ends: Int[Tensor, " X"] = field(repr=False)
    prompts: Int[Tensor, " X"] = field(repr=False)
    chosen: range

    def __len__(self) -> int:
        return len(self.chosen)

    @overload
    def __getitem__(self, place: int) -> Example: ...
    @overload
    def __getitem__(self, place: slice) -> "Encoded": ...
    def __getitem__(self, place: int | slice) -> "Example | Encoded":
        if isinstance(place, slice):
            return Encoded(self.ids, self.ends, self.prompts, self.chosen[place])
        row = self.chosen[place]
        start = int(self.ends[row - 1]) if row else 0
        return Example(
            tuple(self.ids[start : int(self.ends[row])].tolist()), int(self.prompts[row])
        )

    def __iter__(self) -> Iterator[Example]:
        return (self[place] for place in range(len(self)))


def encode_groups(
    groups: Mapping[str, Sequence[Row]],
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    cache: Path | None = None,
) -> dict[str, Encoded]:
    """Return every group's rows encoded, as `encode` does one; from `cache` where they are there.

    A folder that cannot be written is done without.
    """
    texts = texts_of([row for own in groups.values() for row in own], template, tokenizer)
    store = _kept(texts, tokenizer, max_length, cache)
    found: dict[str, Encoded] = {}
    start = 0
    for name, own in groups.items():
        found[name] = store[start : start + len(own)]
        start += len(own)
    return found


def cache_folder() -> Path | None:
    """Return where encoded rows are kept: `POMONA_CACHE`, else `pomona` in the user's cache folder.

    None for a user without a home.
    """
    named = os.environ.get("POMONA_CACHE")
    if named:
        return Path(named)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pomona"
    except RuntimeError:
        return None


def _kept(
    texts: Texts, tokenizer: PreTrainedTokenizerBase, max_length: int, cache: Path | None
) -> Encoded:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if cache is None or backend is None:  # what a slow tokenizer does, nothing tells
        return _encoded(texts, tokenizer, max_length)
    told = [texts, max_length, backend.to_str(), *_settings(tokenizer), sys.byteorder]
    digest = hashlib.sha256(json.dumps(told).encode()).hexdigest()
    path = cache / "tokens" / f"{digest}.safetensors"
    try:
        return _read(path)
    except (OSError, SafetensorError):  # none yet, or half a one that something else has left
        made = _encoded(texts, tokenizer, max_length)
    try:
        _write(path, made)
        return _read(path)
    except (OSError, SafetensorError):
        return made


def _settings(tokenizer: PreTrainedTokenizerBase) -> list[object]:
    """Return what decides the tokens beside the texts and the backend's own description."""
    split = getattr(tokenizer, "split_special_tokens", False)
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    return [split, special, [version(maker) for maker in _MAKERS]]


def _encoded(texts: Texts, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
    parts: list[Tensor] = [torch.zeros(0, dtype=torch.int32)]
    prompts: list[int] = []
    for start in range(0, len(texts), _AT_ONCE):
        some = texts[start : start + _AT_ONCE]
        for example in examples_of(some, tokenizer, max_length):
            parts.append(torch.tensor(example.input_ids, dtype=torch.int32))
            prompts.append(example.prompt_length)
    ends = torch.tensor([len(part) for part in parts[1:]], dtype=torch.int64).cumsum(0)
    sizes = torch.tensor(prompts, dtype=torch.int32)
    return Encoded(torch.cat(parts), ends, sizes, range(len(texts)))


def _write(path: Path, made: Encoded) -> None:
    """Write for the owner alone, as safetensors does; another process may write the same."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        save_file({"ids": made.ids, "ends": made.ends, "prompts": made.prompts}, str(partial))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _read(path: Path) -> Encoded:
    found = load_file(str(path))
    return Encoded(**found, chosen=range(len(found["ends"])))
