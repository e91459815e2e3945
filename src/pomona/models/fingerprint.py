"""Telling checkpoints and models apart, fast enough for every start of a run.

A checkpoint is told by its files, byte by byte for what is small. Of a tensor above 1 MiB eight blocks of
4 KiB are read, spread over it from its first byte to its last, so that 30 GB take seconds. Training,
merging and converting change every block of the tensors they touch and are noticed; an edit of single
weights between the blocks of a large tensor is not.
"""

import hashlib
import os
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pomona.files import cannot_read
from pomona.models.experts import ExpertSite
from pomona.models.weights import Checkpoint, tensor_spans
from pomona.progress import Progress, silent

_WHOLE, _BLOCK, _BLOCKS = 1 << 20, 4096, 8
# What decides a model's answers beside its weights; records, notes and licences do not.
_BESIDE = (
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "*.model",
)


def checkpoint_digests(folder: Path, progress: Progress = silent) -> dict[str, str]:
    """Return a SHA-256 in hexadecimal for every file of a checkpoint folder that decides its answers.

    Raises `PomonaError` naming a file that is missing, damaged or cannot be read.
    """
    weights = set(Checkpoint.open(folder).files.values())
    small = {
        path
        for path in folder.iterdir()
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in _BESIDE)
    }
    digests: dict[str, str] = {}
    for done, path in enumerate(sorted(weights | small)):
        progress("checking the model", done, len(weights | small))
        try:
            digests[path.name] = _of_weights(path) if path in weights else _of_file(path)
        except OSError as error:
            raise cannot_read(path, error) from error
    progress("checking the model", len(digests), len(digests))
    return digests


def _of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _of_weights(path: Path) -> str:
    """Hash the header with every name, type and shape, then the blocks of every tensor."""
    header, spans = tensor_spans(path)
    total = hashlib.sha256(header)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for start, size in spans:
            for offset, length in _blocks(size):
                total.update(os.pread(descriptor, length, start + offset))
    finally:
        os.close(descriptor)
    return total.hexdigest()


def _blocks(size: int) -> list[tuple[int, int]]:
    """Return (offset, length) of what is read of a tensor of `size` bytes."""
    if size <= _WHOLE:
        return [(0, size)]
    return [(k * (size - _BLOCK) // (_BLOCKS - 1), _BLOCK) for k in range(_BLOCKS)]


def base_fingerprint(model: PreTrainedModel, sites: Sequence[ExpertSite]) -> dict[str, str]:
    """Return what tells a loaded model from another one: SHA-256 of four of its parts.

    "embedding" (a grid of a million values), "routers" (whole), "experts" and "layers" (a grid of 64 by
    64 values of every matrix of an expert, and of every other parameter). Values are rounded to bfloat16
    first, so that a model loaded in float32 and in bfloat16 has one fingerprint.
    """
    embedding = cast(Tensor, model.get_input_embeddings().weight)
    routers = [p for site in sites if site.router is not None for p in site.router.parameters()]
    fused = [p for site in sites for p in site.experts.parameters()]
    told = {id(p) for p in (embedding, *routers, *fused)}
    rest = [p for p in model.parameters() if id(p) not in told]
    experts = [m for s in sites for e in range(s.num_experts) for m in _matrices(s, e)]
    return {
        "embedding": _of_tensors([embedding], 1024),
        "routers": _of_tensors(routers),
        "experts": _of_tensors(experts, 64),
        "layers": _of_tensors(rest, 64),
    }


def experts_fingerprint(sites: Sequence[ExpertSite], experts: Sequence[int]) -> str:
    """Return a SHA-256 of the whole weights of one chosen expert per site, rounded to bfloat16."""
    return _of_tensors([m for s, e in zip(sites, experts, strict=True) for m in _matrices(s, e)])


def _matrices(site: ExpertSite, index: int) -> list[Tensor]:
    """One expert's weights and biases, the same whatever the family's layout."""
    own = site.expert(index)
    every = (own.gate, own.up, own.down, own.gate_bias, own.up_bias, own.down_bias)
    return [value for value in every if value is not None]


def _of_tensors(tensors: Iterable[Tensor], side: int | None = None) -> str:
    """Hash shapes and values; with `side` an even grid of at most so many places per dimension."""
    total = hashlib.sha256()
    for tensor in tensors:
        steps = [1 if side is None else -(-size // side) for size in tensor.shape]
        seen = tensor.detach()[tuple(slice(None, None, step) for step in steps)]
        total.update(str(tuple(tensor.shape)).encode())
        total.update(
            seen.to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes()
        )
    return total.hexdigest()
