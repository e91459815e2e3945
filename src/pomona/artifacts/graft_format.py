"""A client's graft as a folder: graft.safetensors beside graft_config.json."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

import pomona
from pomona.errors import PomonaError
from pomona.federation.graft import Graft
from pomona.files import atomic_folder, damaged, read_object, write_json
from pomona.models.weights import read_tensors, write_tensors

_CONFIG, _WEIGHTS = "graft_config.json", "graft.safetensors"


def write_graft(folder: Path, graft: Graft, tensors: Mapping[str, Tensor], base: str) -> None:
    """Write one client's graft (no client dimension); `base` is the base model's path or id."""
    config = {
        "pomona": pomona.__version__,
        "base_model": base,
        "form": graft.form,
        "rank": graft.rank,
        "alpha": graft.alpha,
        "bias": graft.bias,
    }
    with atomic_folder(folder) as partial:
        write_tensors(partial / _WEIGHTS, tensors, {"format": "pt"})
        write_json(partial / _CONFIG, config)


def read_graft(folder: Path) -> tuple[Graft, dict[str, Tensor]]:
    """Read a graft folder back; raises `PomonaError` when it is none or a file of it is damaged."""
    path = folder / _CONFIG
    if not path.is_file():
        raise PomonaError(f"{folder} holds no {_CONFIG}; give a client's graft folder")
    config = read_object(path)
    try:
        graft = Graft(
            form=config["form"],
            rank=int(config["rank"]),
            alpha=float(config["alpha"]),
            bias=bool(config["bias"]),
        )
    except KeyError as error:
        raise damaged(path, f"it has no {error}") from error
    except (TypeError, ValueError, PomonaError) as error:
        raise damaged(path, error) from error
    return graft, read_tensors(folder / _WEIGHTS)
