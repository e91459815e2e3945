"""The shared part as a PEFT adapter folder, the field's interchange format."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import LoraConfig
from torch import Tensor
from torch.nn import functional as fn

from pomona.errors import PomonaError
from pomona.files import atomic_folder, damaged, read_as, write_json
from pomona.models.expert_lora import PARTS
from pomona.models.lora import LoRA
from pomona.models.weights import read_tensors, write_tensors

_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class _Config:
    """What is read of adapter_config.json; PEFT itself checks no types."""

    r: int = 8
    lora_alpha: float = 8.0
    target_modules: list[str] | str | None = None
    target_parameters: list[str] | None = None
    layers_to_transform: list[int] | int | None = None


def write_adapter(
    folder: Path,
    lora: LoRA,
    tensors: Mapping[str, Tensor],
    base: str,
    beside: Mapping[str, object] | None = None,
) -> None:
    """Write one client's LoRA (A [R, in], B [out, R], no client dimension) as a PEFT folder.

    `peft.PeftModel.from_pretrained(model, folder)` loads it. `base` is the base model's path or id;
    `beside` are JSON files of ours, by name, which PEFT passes over. A residual becomes LoRA of full rank.
    """
    lora, tensors = without_residuals(lora, tensors)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType] - PEFT accepts fractions
        target_modules=sorted(lora.targets),
        target_parameters=_tuned_parameters(tensors),
        layers_to_transform=list(lora.layers) or None,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
    )
    # PEFT keeps targets as a set, whose order differs between processes: the same run must give
    # the same bytes.
    config.target_modules = sorted(lora.targets)
    with atomic_folder(folder) as partial:
        config.save_pretrained(str(partial))
        named = {f"{_PREFIX}{_theirs(n)}.weight": _flat(n, v) for n, v in tensors.items()}
        write_tensors(partial / _WEIGHTS, named, {"format": "pt"})
        for name, value in (beside or {}).items():
            write_json(partial / name, value)


def read_adapter(folder: Path) -> tuple[LoRA, dict[str, Tensor]]:
    """Read a PEFT LoRA folder back as its settings and tensors without a client dimension.

    Raises `PomonaError` when the folder is no plain LoRA adapter or a file of it is damaged.
    """
    if not (folder / "adapter_config.json").is_file():
        raise PomonaError(f"{folder} holds no adapter_config.json; give a PEFT adapter folder")
    path = folder / "adapter_config.json"
    plain = read_as(path, _Config)
    try:
        config = LoraConfig.from_pretrained(str(folder))
    except Exception as error:  # PEFT fails at whatever field it comes to first
        raise damaged(path, error) from error
    if not isinstance(config, LoraConfig) or config.use_dora or config.use_rslora:
        raise PomonaError(f"{folder} is no plain LoRA adapter; DoRA and rsLoRA are not supported")
    if config.rank_pattern or config.alpha_pattern or isinstance(plain.target_modules, str):
        raise PomonaError(
            f"{folder} gives layers different ranks or targets by pattern; use a list"
        )
    parameters = sorted({_last(name) for name in plain.target_parameters or ()})
    if parameters and parameters != sorted(PARTS):
        raise PomonaError(
            f"{folder} tunes the parameters {', '.join(parameters)}; experts are tuned whole "
            f"({', '.join(PARTS)}) or not at all"
        )
    layers = plain.layers_to_transform
    chosen = (layers,) if isinstance(layers, int) else tuple(layers or ())
    try:
        targets = tuple(sorted(plain.target_modules or ()))
        lora = LoRA(plain.r, plain.lora_alpha, targets, chosen, bool(parameters))
    except PomonaError as error:
        raise damaged(path, error) from error
    tensors: dict[str, Tensor] = {}
    for name, value in read_tensors(folder / _WEIGHTS).items():
        plain_name = name.removeprefix(_PREFIX).removesuffix(".weight")
        ours, factor = _ours(plain_name)
        tensors[f"{ours}.{factor}"] = _stacked(ours, factor, value, lora.rank)
    return lora, tensors


def _tuned_parameters(tensors: Mapping[str, Tensor]) -> list[str] | None:
    """Return the fused weights by full name: PEFT would tune a short one in every layer."""
    names = {name.rpartition(".")[0] for name, value in tensors.items() if value.ndim == 3}
    return sorted(names, key=lambda n: (n.rpartition(".")[0], PARTS.index(_last(n)))) or None


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _theirs(name: str) -> str:
    """PEFT wraps a module once per tuned parameter; the first one is the inner wrapper."""
    return name.replace(".gate_up_proj.lora", ".base_layer.lora").replace(
        "experts.down_proj.lora", "experts.lora"
    )


def _ours(name: str) -> tuple[str, str]:
    module, _, factor = name.rpartition(".")
    if module.endswith(".base_layer"):
        return f"{module.removesuffix('.base_layer')}.gate_up_proj", factor
    return (f"{module}.down_proj" if module.endswith(".experts") else module), factor


def _flat(name: str, value: Tensor) -> Tensor:
    """PEFT keeps experts' factors in two dimensions: A [E·R, in], B [out, R·E] with E running fastest."""
    if value.ndim == 2:
        return value
    return value.flatten(0, 1) if name.endswith("lora_A") else value.permute(1, 2, 0).flatten(1)


def _stacked(module: str, factor: str, value: Tensor, rank: int) -> Tensor:
    if not module.endswith(tuple(f".experts.{part}" for part in PARTS)):
        return value
    if factor == "lora_A":
        return value.unflatten(0, (-1, rank))
    return value.unflatten(1, (rank, -1)).permute(2, 0, 1).contiguous()


def without_residuals(
    lora: LoRA, tensors: Mapping[str, Tensor]
) -> tuple[LoRA, Mapping[str, Tensor]]:
    """Return an adapter that does the same without residuals: of full rank, with the same factor."""
    names = [name.removesuffix(".residual") for name in tensors if name.endswith(".residual")]
    if not names:
        return lora, tensors
    full = {n: _product(tensors, n) for n in names}
    rank = max(min(value.shape) for value in full.values())
    factors: dict[str, Tensor] = {}
    for name, value_OI in full.items():
        left_OK, sizes_K, right_KI = torch.linalg.svd(value_OI, full_matrices=False)
        short = rank - len(sizes_K)
        factors[f"{name}.lora_A"] = fn.pad(right_KI, (0, 0, 0, short)).float()
        factors[f"{name}.lora_B"] = fn.pad(left_OK * sizes_K, (0, short)).float()
    return replace(lora, rank=rank, alpha=lora.scaling * rank), factors


def _product(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    a_RI, b_OR = (tensors[f"{name}.{factor}"].double() for factor in ("lora_A", "lora_B"))
    return tensors[f"{name}.residual"].double() + b_OR @ a_RI
