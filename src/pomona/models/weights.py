"""Weights on disk: safetensors only, read lazily, written in shards."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from pomona.errors import PomonaError
from pomona.files import atomic_file, damaged, follow_umask, read_object, write_json

SHARD_BYTES = 2_000_000_000
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_KINDS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int8: "I8",
}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder whose tensors are read one at a time, when asked for."""

    folder: Path
    config: dict[str, Any] = field(repr=False)
    files: Mapping[str, Path] = field(repr=False)

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Open a folder with config.json and model.safetensors, whole or sharded.

        Raises `PomonaError` naming the file that is missing, truncated or not safetensors.
        """
        config_path = folder / "config.json"
        if not config_path.is_file():
            raise PomonaError(f"{folder} is no checkpoint folder: it holds no config.json")
        return cls(folder, read_object(config_path), _locate(folder))

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape; only the file's header is read."""
        with _opened(self.files[name]) as file:
            return tuple(file.get_slice(name).get_shape())

    def dtype(self) -> torch.dtype:
        """Return what the weights are kept in.

        As the config says, older ones call it torch_dtype, or else as they lie.
        """
        told = self.config.get("dtype") or self.config.get("torch_dtype")
        found = getattr(torch, str(told), None)
        if isinstance(found, torch.dtype):
            return found
        return self.tensor(min(self.files)).dtype

    def tensor(self, name: str) -> Tensor:
        """Return one tensor; only its bytes are read."""
        if name not in self.files:
            raise PomonaError(
                f'{self.folder} lacks the tensor "{name}"; the checkpoint is incomplete'
            )
        with _opened(self.files[name]) as file:
            return file.get_tensor(name)


def write_sharded(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int = SHARD_BYTES
) -> int:
    """Write a checkpoint's tensors into `folder` as they come; return their total bytes.

    At most one shard is held in memory. A single shard is called model.safetensors, several get
    the index file that transformers reads.
    """
    shards: list[list[str]] = []
    waiting: dict[str, Tensor] = {}
    total, size = 0, 0
    for name, tensor in tensors:
        if waiting and size + tensor.nbytes > max_shard_bytes:
            shards.append(_write_shard(folder, len(shards), waiting))
            waiting, size = {}, 0
        waiting[name] = tensor.contiguous()
        size += tensor.nbytes
        total += tensor.nbytes
    shards.append(_write_shard(folder, len(shards), waiting))
    _name_shards(folder, shards, total)
    return total


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read one safetensors file; raises `PomonaError` naming it when it is missing or damaged."""
    if not path.is_file():
        raise PomonaError(f"{path} is missing; restore it or start anew in another folder")
    try:
        return load_file(str(path))
    except SafetensorError as error:
        raise damaged(path, error) from error


def serialized_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Return how long tensors are as safetensors, header included, from their shapes and types alone.

    The header is JSON without spaces, filled up to a multiple of eight bytes.
    """
    header: dict[str, object] = {}
    end = 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):
        tensor, start = tensors[name], end
        end += tensor.numel() * tensor.element_size()
        shape, span = list(tensor.shape), [start, end]
        header[name] = {"dtype": _KINDS[tensor.dtype], "shape": shape, "data_offsets": span}
    told = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + -(-len(told) // 8) * 8 + end


def tensor_spans(path: Path) -> tuple[bytes, list[tuple[int, int]]]:
    """Return a safetensors file's header and every tensor's (first byte, size in bytes), in order.

    Raises `PomonaError` naming a file that is missing or damaged.
    """
    _opened(path)  # the library's own checks come first
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length)
    ends = sorted(
        entry["data_offsets"]
        for name, entry in json.loads(header).items()
        if name != "__metadata__"
    )
    return header, [(8 + length + start, end - start) for start, end in ends]


def metadata(path: Path) -> dict[str, str]:
    """Return what `write_tensors` was given beside the tensors."""
    with _opened(path) as file:
        return dict(file.metadata() or {})


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write one safetensors file atomically, names in order, so that equal tensors give equal bytes."""
    ordered = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    with atomic_file(path) as partial:
        _save(ordered, partial, dict(metadata))


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Safetensors reports a full disk as its own error; make it an OSError as everywhere else."""
    try:
        save_file(tensors, str(path), metadata)
    except SafetensorError as error:
        raise OSError(None, str(error)) from error
    follow_umask(path)


def _write_shard(folder: Path, number: int, tensors: dict[str, Tensor]) -> list[str]:
    _save(tensors, folder / f"shard-{number}", {"format": "pt"})
    return list(tensors)


def _name_shards(folder: Path, shards: list[list[str]], total: int) -> None:
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / _SINGLE)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{number}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _locate(folder: Path) -> dict[str, Path]:
    if (folder / _INDEX).is_file():
        weight_map = read_object(folder / _INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise damaged(folder / _INDEX, "it has no weight_map")
        paths = {folder / str(file) for file in cast(dict[str, Any], weight_map).values()}
    elif (folder / _SINGLE).is_file():
        paths = {folder / _SINGLE}
    else:
        raise PomonaError(
            f"{folder} holds no {_SINGLE}; convert other weight formats to safetensors first"
        )
    located: dict[str, Path] = {}
    for path in sorted(paths):
        with _opened(path) as file:
            located |= dict.fromkeys(file.keys(), path)
    return located


def _opened(path: Path) -> Any:
    if not path.is_file():
        raise PomonaError(f"{path} is missing; the checkpoint's index names it")
    try:
        return safe_open(str(path), framework="pt")
    except SafetensorError as error:
        raise damaged(path, error) from error


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """Write a model's weights and configuration, readable by whom the user's umask says."""
    try:
        model.save_pretrained(folder)
    except SafetensorError as error:
        raise OSError(None, str(error)) from error
    for path in folder.glob("*.safetensors"):
        follow_umask(path)
