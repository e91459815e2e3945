"""Reconstruct: a dense checkpoint becomes a stock mixture-of-experts checkpoint.

DIVE (arXiv 2506.09351), sections 3.1 to 3.4: calibrate → score → affinity → cluster → plan →
compensate → route → assemble → retrain.
"""

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pomona.artifacts.model_card import mixture_card
from pomona.artifacts.reconstruction_records import read_records, write_records
from pomona.artifacts.workspace import Workspace
from pomona.data.texts import consecutive_windows, digest, sample_windows
from pomona.errors import PomonaError
from pomona.files import atomic_folder, cannot_write, write_json, write_text
from pomona.models.dense import MixtureSizes, container_of, dense_family
from pomona.models.experts import find_expert_sites, freeze
from pomona.models.loading import (
    checkpoint_folder,
    context_length,
    load_model,
    load_tokenizer,
)
from pomona.models.weights import Checkpoint, write_sharded
from pomona.progress import Progress, silent
from pomona.reconstruction.affinity import DomainAffinity, perplexity_affinity, score_affinity
from pomona.reconstruction.assemble import mixture_tensors, no_router
from pomona.reconstruction.calibrate import ChannelStats, calibrate
from pomona.reconstruction.cluster import Clusters, cluster, random_groups, refine
from pomona.reconstruction.compensate import Refit
from pomona.reconstruction.estimate import Estimate, estimate
from pomona.reconstruction.ffn import DenseModel, dense_model, mean_hidden
from pomona.reconstruction.plan import ExpertPlan
from pomona.reconstruction.planners import Calibration
from pomona.reconstruction.result import Reconstruction
from pomona.reconstruction.retraining import Retraining, StageState, retrain
from pomona.reconstruction.scores import score_layers
from pomona.reconstruction.settings import ReconstructSettings
from pomona.shapes import Tokens

__all__ = ["Estimate", "ReconstructSettings", "Reconstruction", "preview", "reconstruct"]

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


@dataclass(frozen=True)
class _Groups:
    """The domains of every expert; why, if their affinity said so."""

    names: tuple[tuple[str, ...], ...]
    affinity: DomainAffinity | None = None
    clusters: Clusters | None = None


def reconstruct(
    model: str | Path,
    domains: Mapping[str, Sequence[str]],
    out: Path,
    settings: ReconstructSettings,
    progress: Progress = silent,
    text: Sequence[str] | None = None,
) -> Reconstruction:
    """Make a mixture of experts of the dense checkpoint `model`, a folder or a Hub id.

    `domains` maps names to documents (`ReconstructSettings.split_domains` if they are few); `text` is
    what to retrain on, the domains' own if None. `out` must be new or empty; it appears whole or not at
    all. With retraining, what is done so far is kept in `.OUT.work`, and the same call goes on from
    there. Raises `PomonaError` naming what is wrong with the model, a domain or the disk.
    """
    _check_out(out)
    settings.check_domains(list(domains))
    if settings.retrain is None:
        return _assemble(model, domains, out, settings, progress)
    documents = [document for own in domains.values() for document in own]
    documents = list(text) if text is not None else documents
    identity = {"model": str(model), "settings": settings.to_json(), "text": digest(documents)}
    with Workspace.open(out, identity) as work:
        if not work.mixture.is_dir():
            _assemble(model, domains, work.mixture, settings, progress)
        made = _retrain(model, documents, work, out, settings, settings.retrain, progress)
        work.remove()
    return made


def preview(model: str | Path, domains: Sequence[str], settings: ReconstructSettings) -> Estimate:
    """Return what `reconstruct` would make and what it would cost, without making it."""
    settings.check_domains(domains)
    checkpoint = Checkpoint.open(checkpoint_folder(model))
    return estimate(checkpoint, dense_family(checkpoint), settings, len(domains))


def _retrain(
    model: str | Path,
    documents: Sequence[str],
    work: Workspace,
    out: Path,
    settings: ReconstructSettings,
    how: Retraining,
    progress: Progress,
) -> Reconstruction:
    """Retrain the mixture in the workspace and write it to `out`, merged."""
    student = load_model(work.mixture, how.dtype)
    stored = Checkpoint.open(work.mixture).config.get("dtype")
    teacher = None
    if how.objective.loss == "distil":
        teacher = load_model(checkpoint_folder(model), how.dtype)
        freeze(teacher)
    _check_length(how.length, context_length(student), work.mixture)
    windows_BT = consecutive_windows(documents, load_tokenizer(work.mixture), how.length)
    if windows_BT.shape[1] < how.length:
        raise PomonaError(
            f"the text to retrain on has fewer than {how.length} tokens; give it more or make length "
            "smaller"
        )
    sites = () if settings.experts == 1 else tuple(find_expert_sites(student))
    resume, losses = work.load()
    history = losses.tolist()

    def after(state: StageState, loss: float) -> None:
        history.append(loss)
        if state.moments.step % how.save_every == 0:
            work.save(state, torch.tensor(history))

    retrain(student, sites, teacher, windows_BT, how, settings.seed, resume, after, progress)
    made = read_records(work.mixture / "reconstruction", out)
    with atomic_folder(out) as partial:
        student.to(getattr(torch, stored or how.dtype)).save_pretrained(partial)
        for kept in (*_TOKENIZER_FILES, "reconstruction"):
            _copy(work.mixture / kept, partial / kept)
        write_json(partial / "reconstruction" / "retraining.json", {"losses": history})
        write_text(partial / "README.md", mixture_card(str(model), made, settings))
    return made


def _assemble(
    model: str | Path,
    domains: Mapping[str, Sequence[str]],
    out: Path,
    settings: ReconstructSettings,
    progress: Progress,
) -> Reconstruction:
    """Write the mixture as calibration leaves it."""
    checkpoint = Checkpoint.open(checkpoint_folder(model))
    family = dense_family(checkpoint)
    base = load_model(checkpoint.folder, "float32")
    _check_length(settings.length, context_length(base), checkpoint.folder)
    freeze(base)
    dense = dense_model(base, family)
    width = settings.width(dense.channels)

    calibration = _calibrate(checkpoint.folder, dense, domains, settings, progress)
    groups = _group(checkpoint.folder, calibration, domains, width, settings, progress)
    plan = settings.planner(
        calibration, groups.names, settings.score, width, settings.active, settings.seed
    )
    shared = plan.shared_LS.shape[1]
    sizes = MixtureSizes(
        settings.experts, settings.active, width, shared, settings.compensation.biased
    ).aligned()
    container = container_of(family, sizes)
    config = container.config(checkpoint.config, sizes)
    grouped = [_share(calibration.windows, group) for group in plan.groups]
    refits = _compensate(dense, grouped, plan, settings, progress)
    routers = _route(dense, grouped, plan, refits, settings, progress)

    with atomic_folder(out) as partial:
        counted = _Counted()
        tensors = mixture_tensors(checkpoint, family, container, sizes, plan, refits, routers)
        write_sharded(partial, counted.passing(tensors))
        write_json(partial / "config.json", config)
        for name in _TOKENIZER_FILES:
            _copy(checkpoint.folder / name, partial / name)
        dense_size = sum(p.numel() for p in base.parameters())
        idle = (sizes.experts - sizes.active) * 3 * sizes.width * base.config.hidden_size
        made = Reconstruction(
            out,
            container.name,
            sizes,
            plan,
            groups.affinity,
            groups.clusters,
            counted.parameters,
            counted.parameters - idle * len(dense.ffns),
            dense_size,
        )
        write_records(partial / "reconstruction", made, settings)
        write_text(partial / "README.md", mixture_card(str(model), made, settings))
    return made


class _Counted:
    """Counts parameters as they stream by."""

    def __init__(self) -> None:
        self.parameters = 0

    def passing(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors:
            self.parameters += tensor.numel()
            yield name, tensor


def _calibrate(
    folder: Path,
    dense: DenseModel,
    domains: Mapping[str, Sequence[str]],
    settings: ReconstructSettings,
    progress: Progress,
) -> Calibration:
    """Draw windows, split domains where there are fewer than experts, gather statistics."""
    windows = _windows(folder, domains, settings, settings.windows, "calibration")
    if settings.grouping == "affinity":
        windows = refine(windows, lambda own_BT: mean_hidden(dense, own_BT), settings.experts)
    stats: dict[str, list[ChannelStats]] = {}
    for done, (name, windows_BT) in enumerate(windows.items()):
        progress("calibrating", done, len(windows))
        stats[name] = calibrate(dense, windows_BT, settings.score.gradients)
    progress("calibrating", len(windows), len(windows))
    return Calibration(dense, windows, stats)


def _group(
    folder: Path,
    calibration: Calibration,
    domains: Mapping[str, Sequence[str]],
    width: int,
    settings: ReconstructSettings,
    progress: Progress,
) -> _Groups:
    names = tuple(calibration.stats)
    if settings.grouping == "all" or settings.experts == 1:
        return _Groups((names,) * settings.experts)
    if settings.grouping == "random":
        return _Groups(random_groups(names, settings.experts, settings.seed))
    scores = [
        score_layers(settings.score, own, calibration.dense) for own in calibration.stats.values()
    ]
    if settings.affinity == "scores" or len(names) != len(domains):
        affinity = score_affinity(names, scores)  # parts of domains have no held-out text
    else:
        held = _windows(folder, domains, settings, settings.affinity_windows, "affinity")
        affinity = perplexity_affinity(
            calibration.dense,
            names,
            scores,
            list(held.values()),
            width,
            settings.correlate,
            progress,
        )
    clusters = cluster(affinity, settings.experts, settings.linkage)
    return _Groups(clusters.groups, affinity, clusters)


def _compensate(
    dense: DenseModel,
    windows: Sequence[Tensor],
    plan: ExpertPlan,
    settings: ReconstructSettings,
    progress: Progress,
) -> list[Sequence[Refit]]:
    """Return every layer's refits, one per expert."""
    per_expert: list[Sequence[Refit]] = []
    for expert, windows_BT in enumerate(windows):
        progress("compensating", expert, len(windows))
        per_expert.append(settings.compensation(dense, windows_BT, plan, expert))
    progress("compensating", len(windows), len(windows))
    return list(zip(*per_expert, strict=True))


def _route(
    dense: DenseModel,
    windows: Sequence[Tensor],
    plan: ExpertPlan,
    refits: Sequence[Sequence[Refit]],
    settings: ReconstructSettings,
    progress: Progress,
) -> list[Tensor]:
    if len(windows) == 1:
        return no_router(len(dense.ffns), dense.downs[0].out_features)
    progress("routing", 0, 1)
    downs = [[refit.column_DW for refit in layer] for layer in refits]
    routers = settings.router(dense, windows, plan, downs, settings.seed)
    progress("routing", 1, 1)
    return routers


def _windows(
    folder: Path,
    domains: Mapping[str, Sequence[str]],
    settings: ReconstructSettings,
    count: int,
    purpose: str,
) -> dict[str, Tokens]:
    """Draw every domain's windows; another purpose draws others."""
    tokenizer = load_tokenizer(folder)
    seed = f"{settings.seed}/{purpose}"
    return {
        name: sample_windows(texts, tokenizer, count, settings.length, seed, name)
        for name, texts in domains.items()
    }


def _share(windows: Mapping[str, Tensor], group: Sequence[str]) -> Tensor:
    """Give every domain of a group an equal share of the group's windows (DIVE, section 3.2).

    The domains take turns, so that whoever reads only the first windows sees all of them.
    """
    each = max(1, min(len(windows[domain]) for domain in group) // len(group))
    return torch.stack([windows[domain][:each] for domain in group], dim=1).flatten(0, 1)


def _copy(source: Path, target: Path) -> None:
    """Copy a file or folder, if it is there."""
    if source.is_dir():
        shutil.copytree(source, target)
    elif source.is_file():
        shutil.copyfile(source, target)


def _check_out(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise PomonaError(f"{out} exists and is not empty; choose a new folder")
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(out, error) from error


def _check_length(length: int, context: int, folder: Path) -> None:
    if length > context:
        raise PomonaError(
            f"windows of {length} tokens are longer than the context of {folder}, {context} tokens; "
            "make length smaller"
        )
