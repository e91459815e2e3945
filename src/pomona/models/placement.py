"""Where a model's weights lie while it is used: all on one device, or on disk until a layer's turn."""

import ctypes
import logging
import sys
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import psutil
import torch
from accelerate import dispatch_model
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from pomona.errors import PomonaError
from pomona.models.dense import DenseFamily
from pomona.models.loading import Dtype, check_tensors, load_model, outline_model
from pomona.models.weights import SHARD_BYTES, Checkpoint

_M_MMAP_THRESHOLD = -3  # of malloc.h
_OFFLOADED = 4  # layers at once where nobody says how many


@dataclass(frozen=True)
class Placement:
    """`device` "auto" is the first GPU, if there is one, else the CPU.

    With `offload` a layer's weights are read from the checkpoint when it is used and dropped again, so
    that a model larger than memory runs. `layers` are how many layers' sums and experts are held at once
    while a mixture is made, 0 for all; None is 4 with `offload`, which is for want of memory, else all. On
    one device no weight of the result depends on these two.
    """

    device: str = "auto"
    offload: bool = False
    layers: int | None = None

    def __post_init__(self) -> None:
        if self.layers is not None and self.layers < 0:
            raise PomonaError(f"layers {self.layers} is negative; use 0 for all at once")
        self.torch_device()

    @property
    def shard_bytes(self) -> int:
        """How much of the result waits in memory to be written; little where memory is short."""
        return SHARD_BYTES // 8 if self.offload else SHARD_BYTES

    def at_once(self, layers: int) -> int:
        """Return how many of so many layers are held at once."""
        own = self.layers
        if own is None:
            own = _OFFLOADED if self.offload else 0
        return min(own, layers) or layers

    def torch_device(self) -> torch.device:
        """Return the device; raises `PomonaError` where this machine has none of that name."""
        return find_device(self.device)


def find_device(name: str) -> torch.device:
    """Return a device by name, "auto" for the first GPU if there is one, else the CPU.

    Raises `PomonaError` where this machine has none of that name.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise PomonaError(f'device "{name}" is not there; use auto, cpu or cuda') from error


def find_devices(name: str) -> tuple[torch.device, ...]:
    """Return all devices that a name stands for: every GPU for "auto" and "cuda", else the one of that name.

    Raises `PomonaError` where this machine has none of that name.
    """
    first = find_device(name)
    if first.type != "cuda" or name not in ("auto", "cuda"):
        return (first,)
    return tuple(torch.device("cuda", index) for index in range(torch.cuda.device_count()))


def device_of(model: nn.Module) -> torch.device:
    """Return where a model wants its input: the device of its token embeddings."""
    return cast(Tensor, cast(PreTrainedModel, model).get_input_embeddings().weight).device


def memory_gib() -> float:
    """Return what this process holds on its GPUs, at its most; without one, what of it is in memory now."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        devices = range(torch.cuda.device_count())
        return sum(torch.cuda.max_memory_allocated(device) for device in devices) / 2**30
    return psutil.Process().memory_info().rss / 2**30


@contextmanager
def placed(
    checkpoint: Checkpoint, family: DenseFamily, dtype: Dtype, placement: Placement
) -> Generator[PreTrainedModel]:
    """Yield the model of a dense checkpoint where `placement` says."""
    device = placement.torch_device()
    if not placement.offload:
        yield moved(load_model(checkpoint.folder, dtype), device)
        return
    _give_back_freed()
    yield _offloaded(checkpoint, family, dtype, device)


def _offloaded(
    checkpoint: Checkpoint, family: DenseFamily, dtype: Dtype, device: torch.device
) -> PreTrainedModel:
    """Return a model whose layers are read from the checkpoint when they are used.

    `from_pretrained` could place it so too, but where it converts dtypes it reads every weight on its way and
    keeps all pages of the files in memory meanwhile.
    """
    model = outline_model(checkpoint.folder, dtype, buffers=True)
    check_tensors(model, checkpoint)
    count = int(checkpoint.config["num_hidden_layers"])
    blocks = [family.mlp.rpartition(".")[0].format(layer=layer) for layer in range(count)]
    names = {name for name, _ in model.named_parameters()}
    ends = {name for name in names if not name.startswith(tuple(f"{b}." for b in blocks))}
    for name in ends:
        value = checkpoint.tensor(name)
        set_module_tensor_to_device(model, name, str(device), value, model.dtype)
    model.tie_weights()
    kind = str(model.dtype).removeprefix("torch.")
    index = {
        name: {"safetensors_file": str(checkpoint.files[name]), "weight_name": name, "dtype": kind}
        for name in names - ends
    }
    device_map = dict.fromkeys(family.ends, str(device)) | dict.fromkeys(blocks, "disk")
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)  # it was asked for
    dispatch_model(model, device_map, str(device), offload_index=index)  # pyright: ignore
    return model.eval()


def _give_back_freed() -> None:
    """Have glibc return freed blocks of a megabyte and more at once.

    By itself it comes to keep those of up to 32 MB, scattered between what is still used: measured, that was
    more than all that a reconstruction holds.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def moved(model: PreTrainedModel, to: torch.device | torch.dtype) -> PreTrainedModel:
    """Return the model itself, on another device or in another dtype."""
    cast(nn.Module, model).to(to)
    return model
