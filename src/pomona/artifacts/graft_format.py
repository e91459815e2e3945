"""A client's graft as a folder: graft.safetensors beside graft_config.json."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import Tensor

import pomona
from pomona.artifacts.origin import ORIGIN, Origin
from pomona.errors import PomonaError
from pomona.federation.graft import Graft, GraftForm, GraftGate, GraftWeights
from pomona.files import atomic_folder, damaged, read_as, write_json
from pomona.models.weights import read_tensors, write_tensors

_CONFIG, _WEIGHTS = "graft_config.json", "graft.safetensors"


@dataclass(frozen=True)
class _Config:
    form: str
    rank: int
    alpha: float
    bias: bool
    # Written only where they differ, so that a single graft's folder is what it always was.
    count: int = 1
    gate: str = "router"
    weights: str = "lora"


def write_graft(folder: Path, graft: Graft, tensors: Mapping[str, Tensor], origin: Origin) -> None:
    """Write one client's graft (no client dimension) with what it grew from."""
    config = {
        "pomona": pomona.__version__,
        "base_model": origin.model,
        "form": graft.form,
        "rank": graft.rank,
        "alpha": graft.alpha,
        "bias": graft.bias,
        **_beyond(graft),
    }
    with atomic_folder(folder) as partial:
        write_tensors(partial / _WEIGHTS, tensors, {"format": "pt"})
        write_json(partial / _CONFIG, config)
        write_json(partial / ORIGIN, origin.to_json())


def _beyond(graft: Graft) -> dict[str, Any]:
    """What a graft has beyond a single private expert with a trained gate and LoRA.

    Where a trained gate started does not matter any more.
    """
    gate = {} if graft.trains_gate else {"gate": graft.gate}
    several = {} if graft.count == 1 else {"count": graft.count}
    weights = {} if graft.weights == "lora" else {"weights": graft.weights}
    return {**several, **gate, **weights}


def read_graft(folder: Path) -> tuple[Graft, dict[str, Tensor]]:
    """Read a graft folder back; raises `PomonaError` when it is none or a file of it is damaged."""
    path = folder / _CONFIG
    if not path.is_file():
        raise PomonaError(f"{folder} holds no {_CONFIG}; give a client's graft folder")
    config = read_as(path, _Config)
    try:
        graft = Graft(
            form=cast(GraftForm, config.form),  # checked there
            rank=config.rank,
            alpha=config.alpha,
            bias=config.bias,
            count=config.count,
            gate=cast(GraftGate, config.gate),
            weights=cast(GraftWeights, config.weights),
        )
    except PomonaError as error:
        raise damaged(path, error) from error
    return graft, read_tensors(folder / _WEIGHTS)
