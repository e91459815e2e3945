"""The shared part as a PEFT adapter folder, the field's interchange format."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from peft import LoraConfig
from torch import Tensor

from pomona.errors import PomonaError
from pomona.files import atomic_folder, damaged, read_as, write_json
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


def write_adapter(
    folder: Path,
    lora: LoRA,
    tensors: Mapping[str, Tensor],
    base: str,
    beside: Mapping[str, object] | None = None,
) -> None:
    """Write one client's LoRA (A [R, in], B [out, R], no client dimension) as a PEFT folder.

    `peft.PeftModel.from_pretrained(model, folder)` loads it. `base` is the base model's path or id;
    `beside` are JSON files of ours, by name, which PEFT passes over.
    """
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType] - PEFT accepts fractions
        target_modules=sorted(lora.targets),
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
        named = {f"{_PREFIX}{name}.weight": value for name, value in tensors.items()}
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
    try:
        lora = LoRA(plain.r, plain.lora_alpha, tuple(sorted(plain.target_modules or ())))
    except PomonaError as error:
        raise damaged(path, error) from error
    tensors = {
        name.removeprefix(_PREFIX).removesuffix(".weight"): value
        for name, value in read_tensors(folder / _WEIGHTS).items()
    }
    return lora, tensors
