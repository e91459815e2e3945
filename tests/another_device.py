"""A device that is not the CPU, for machines without one: its tensors are the CPU's behind a wall.

What meets a tensor of the other side fails as it would on a GPU; scalars and copies alone pass. Run as a
program, `python another_device.py RECIPE…`, it federates on the CPU and there.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import (
    _setup_privateuseone_for_python_backend as name_backend,  # pyright: ignore[reportPrivateUsage]
)

NAME = "yonder"
_COPIES = ("aten::copy_", "aten::index_put_", "aten::set_")


class Yonder(torch.Tensor):
    """A tensor of the other device; `here` holds its values."""

    here: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore

    @staticmethod
    def __new__(cls, here: torch.Tensor) -> "Yonder":
        return torch.Tensor._make_wrapper_subclass(  # pyright: ignore
            cls,
            here.size(),
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=f"{NAME}:0",
        )

    def __init__(self, here: torch.Tensor) -> None:
        self.here = here

    def tolist(self) -> Any:
        """Return the values: torch does not do it for subclasses."""
        return self.here.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


class Border(TorchDispatchMode):
    """Within it tensors are made on, and moved to, the other device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


class Making(TorchFunctionMode):
    """Where torch fills memory itself, without asking a mode, from numbers: they are moved afterwards."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        if func is torch.Tensor.new_tensor:
            return torch.tensor(args[1], dtype=args[0].dtype).to(args[0].device)
        if func is torch.Tensor.__getitem__ and isinstance(args[1], list):
            args = (args[0], torch.tensor(args[1]).to(args[0].device))
        return func(*args, **kwargs)


def _dispatch(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name  # pyright: ignore
    given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    wanted = kwargs.get("device")
    if wanted is not None:
        far = torch.device(wanted).type == NAME
        kwargs = {**kwargs, "device": torch.device("cpu") if far else wanted}
    else:
        sides = {isinstance(t, Yonder) for t in given if t.ndim}
        if len(sides) == 2 and name not in _COPIES:
            raise RuntimeError(f"{name} meets tensors of two devices")
        far = (
            isinstance(given[0], Yonder)
            if name in _COPIES
            else any(isinstance(t, Yonder) for t in given)
        )
    here_args, here_kwargs = tree_map(_here, args), tree_map(_here, kwargs)
    if name == "aten::histc":  # GPUs count integers, the CPU does not
        out = func(here_args[0].float(), *here_args[1:], **here_kwargs).to(here_args[0].dtype)
    else:
        out = func(*here_args, **here_kwargs)
    if not far:
        return out
    known = {id(t.here): t for t in given if isinstance(t, Yonder)}
    return tree_map(
        lambda t: known.get(id(t), Yonder(t)) if isinstance(t, torch.Tensor) else t, out
    )


def _here(value: Any) -> Any:
    return value.here if isinstance(value, Yonder) else value


def main() -> None:
    from pomona.artifacts.run import RunDirectory
    from pomona.federation.settings import FederateSettings
    from pomona.pipelines.federate import federate
    from pomona.recipe import dump, read_recipe

    name_backend(NAME)
    for recipe in map(Path, sys.argv[1:]):
        settings = read_recipe(recipe, FederateSettings)
        for device in ("cpu", NAME):
            out, about = recipe.with_suffix(f".{device}"), {"method": device, "seed": 0}
            with RunDirectory.open(out, dump(settings), about) as run, Border(), Making():
                _check_border()
                federate(settings, run, device=device)


def _check_border() -> None:
    """A wall that everything passes would prove nothing."""
    try:
        torch.ones(2) + torch.ones(2).to(NAME)
    except RuntimeError as error:
        assert "two devices" in str(error)
    else:
        raise AssertionError("tensors of two devices were added")


if __name__ == "__main__":
    main()
