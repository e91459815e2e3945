"""A reconstructed checkpoint on disk: weights, config, tokenizer, records and card, whole or not at all."""

import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pomona.artifacts.model_card import mixture_card
from pomona.artifacts.reconstruction_records import write_records
from pomona.files import atomic_folder, write_json, write_text
from pomona.models.dense import container_of, dense_family
from pomona.models.loading import checkpoint_folder
from pomona.models.weights import Checkpoint, save_model, write_sharded
from pomona.reconstruction.affinity import DomainAffinity
from pomona.reconstruction.assemble import mixture_tensors
from pomona.reconstruction.cluster import Clusters
from pomona.reconstruction.plan import ExpertPlan
from pomona.reconstruction.result import Reconstruction
from pomona.reconstruction.settings import ReconstructSettings
from pomona.reconstruction.specialise import LayerExperts

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
)


def write_mixture(
    out: Path,
    model: str,
    checkpoint: Checkpoint,
    plan: ExpertPlan,
    experts: Iterable[LayerExperts],
    affinity: DomainAffinity | None,
    clusters: Clusters | None,
    settings: ReconstructSettings,
    shard_bytes: int,
) -> Reconstruction:
    """Write the checkpoint while its layers are made, then what is known of it.

    `model` is what the dense checkpoint is called, `shard_bytes` how much is held before it is
    written. Raises `PomonaError` when the disk refuses.
    """
    family, sizes = dense_family(checkpoint), settings.sizes(plan.channels)
    container = container_of(family, sizes)
    passing = _Passing()
    with atomic_folder(out) as partial:
        noted = passing.experts(experts)
        tensors = mixture_tensors(checkpoint, family, container, sizes, plan.shared_LS, noted)
        write_sharded(partial, passing.tensors(tensors), shard_bytes)
        write_json(partial / "config.json", container.config(checkpoint.config, sizes))
        copy_tokenizer(checkpoint.folder, partial)
        hidden = checkpoint.shape(f"{family.mlp.format(layer=0)}.down_proj.weight")[0]
        idle = (sizes.experts - sizes.active) * 3 * sizes.width * hidden * len(passing.kept)
        made = Reconstruction(
            out,
            container.name,
            sizes,
            replace(plan, keep_LEW=torch.stack(passing.kept)),
            affinity,
            clusters,
            passing.parameters,
            passing.parameters - idle,
            sum(prod(checkpoint.shape(name)) for name in checkpoint.files),
        )
        write_records(partial / "reconstruction", made, settings)
        write_text(partial / "README.md", mixture_card(model, checkpoint.folder, made, settings))
    return made


def write_retrained(
    out: Path,
    student: PreTrainedModel,
    mixture: Path,
    model: str,
    made: Reconstruction,
    settings: ReconstructSettings,
    losses: Sequence[float],
) -> None:
    """Write a retrained mixture; tokenizer and records are those of the folder it was before."""
    with atomic_folder(out) as partial:
        save_model(student, partial)
        _copy_all((*_TOKENIZER_FILES, "reconstruction"), mixture, partial)
        write_json(partial / "reconstruction" / "retraining.json", {"losses": list(losses)})
        card = mixture_card(model, checkpoint_folder(model), made, settings)
        write_text(partial / "README.md", card)


class _Passing:
    """Notes the channels that experts keep and counts parameters while both stream by."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []
        self.parameters = 0

    def experts(self, layers: Iterable[LayerExperts]) -> Iterator[LayerExperts]:
        for layer in layers:
            self.kept.append(layer.keep_EW)
            yield layer

    def tensors(self, named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in named:
            self.parameters += tensor.numel()
            yield name, tensor


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a checkpoint's tokenizer and what it says of generation."""
    _copy_all(_TOKENIZER_FILES, source, target)


def _copy_all(names: Iterable[str], source: Path, target: Path) -> None:
    """Copy those files and folders that are there."""
    for name in names:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name)
        elif (source / name).is_file():
            shutil.copyfile(source / name, target / name)
