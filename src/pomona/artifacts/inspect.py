"""What a folder is: a checkpoint, an adapter, a graft, a run, a site's state, a set of keys."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pomona.artifacts.finished import load_run
from pomona.artifacts.graft_format import read_graft
from pomona.artifacts.origin import read_origin
from pomona.artifacts.shared_format import read_shared
from pomona.errors import PomonaError
from pomona.files import read_object
from pomona.models.experts import expert_sites_if_any
from pomona.models.loading import outline_model
from pomona.models.weights import Checkpoint

Told = dict[str, str]
"""What is known of a folder, in order."""


def inspect(path: Path) -> Told:
    """Return what a folder is, by what lies in it; raises `PomonaError` for one that is none of ours."""
    if not path.is_dir():
        raise PomonaError(f"{path} is no folder; give a checkpoint, an adapter, a graft or a run")
    for name, tell in _KINDS.items():
        if (path / name).exists():
            return tell(path)
    raise PomonaError(
        f"{path} is nothing that Pomona reads or writes: it holds none of {', '.join(_KINDS)}"
    )


def _checkpoint(path: Path) -> Told:
    model = outline_model(str(path))
    opened = Checkpoint.open(path)
    sites = expert_sites_if_any(model)
    told = {"what": "a checkpoint", "architecture": type(model).__name__}
    if opened.config.get("auto_map"):
        told["architecture"] += " with code beside it (trust_remote_code)"
    told["parameters"] = f"{sum(p.numel() for p in model.parameters()):,}"
    told["dtype"] = str(opened.dtype()).removeprefix("torch.")
    if sites:
        config: Any = model.config.get_text_config()
        counts = sorted({site.num_experts for site in sites})
        told["experts"] = f"{', '.join(map(str, counts))} in {len(sites)} layers"
        told["active experts"] = str(getattr(config, "num_experts_per_tok", "?"))
    grown = opened.config.get("private_experts")
    if isinstance(grown, Mapping):
        told["private experts"] = f"in {len(grown)} layers"
    if (path / "reconstruction/plan.json").is_file():
        told["made by"] = "pomona reconstruct"
    return told


def _graft(path: Path) -> Told:
    graft, tensors = read_graft(path)
    form = f"{graft.count} per layer, {graft.form}, gate {graft.gate}"
    size = f"LoRA of rank {graft.rank}" if graft.weights == "lora" else "whole differences"
    told = {"what": "a client's graft (private experts)", "form": f"{form}, {size}"}
    return told | _counted(tensors) | _origin(path)


def _adapter(path: Path) -> Told:
    folder = read_shared(path)
    lora = folder.lora
    told = {
        "what": "a PEFT adapter (LoRA)",
        "form": f"rank {lora.rank}, alpha {lora.alpha:g} on {', '.join(lora.targets)}"
        + (" and the experts" if lora.experts else ""),
    }
    if folder.expert is not None:
        told["shared expert"] = f"rank {folder.expert.rank}, in expert/"
    return told | _counted(folder.adapter) | _origin(path)


def _run(path: Path) -> Told:
    about = read_object(path / "run.json")
    told = {"what": "a federation's run folder", "method": str(about.get("method"))}
    told["seed"], told["Pomona"] = str(about.get("seed")), str(about.get("pomona"))
    if not (path / "results.json").is_file():
        state = path / "checkpoint/state.json"
        rounds = json.loads(state.read_text("utf-8")).get("round") if state.is_file() else 0
        return told | {"state": f"after round {rounds}, not finished: the same command goes on"}
    results = load_run(path).results
    clients = sorted(results["base"]["clients"])
    told["clients"] = ", ".join(clients)
    for model in ("base", "shared", "personal"):
        if results.get(model):
            told[f"{model} loss"] = f"{results[model]['mean']['loss']:.4f}"
    return told | {"parts": ", ".join(_parts(path))}


def _parts(path: Path) -> list[str]:
    found = [path / "shared", *sorted((path / "clients").glob("*/*"))]
    return [str(own.relative_to(path)) for own in found if own.is_dir()]


def _site(path: Path) -> Told:
    told = {"what": "a site's state: what is private stays here", "run": str(path / "run")}
    return told | {key: value for key, value in _run(path / "run").items() if key != "what"}


def _counted(tensors: Mapping[str, Any]) -> Told:
    return {"parameters": f"{sum(v.numel() for v in tensors.values() if v.is_floating_point()):,}"}


def _origin(path: Path) -> Told:
    origin = read_origin(path)
    if origin is None:
        return {}
    return {"base": origin.model, "template": str(origin.template.get("kind"))}


_KINDS: dict[str, Callable[[Path], Told]] = {
    "graft_config.json": _graft,
    "adapter_config.json": _adapter,
    "run.json": _run,
    "config.json": _checkpoint,
    "run/run.json": _site,
}
