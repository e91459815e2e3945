"""Reconstruct: a dense checkpoint becomes a stock mixture-of-experts checkpoint.

DIVE (arXiv 2506.09351), sections 3.1 to 3.4: calibrate → score → affinity → cluster → plan →
compensate → route → assemble → retrain.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pomona.artifacts.mixture import write_mixture, write_retrained
from pomona.artifacts.reconstruction_records import read_records
from pomona.artifacts.workspace import Workspace
from pomona.data.texts import consecutive_windows, digest
from pomona.errors import PomonaError
from pomona.files import cannot_write
from pomona.models.dense import container_of, dense_family
from pomona.models.experts import find_expert_sites, freeze
from pomona.models.fingerprint import checkpoint_digests
from pomona.models.loading import (
    checkpoint_folder,
    context_length,
    load_model,
    load_tokenizer,
    outline_checkpoint,
    outline_model,
)
from pomona.models.placement import Placement, moved, placed
from pomona.models.weights import Checkpoint
from pomona.progress import Progress, silent
from pomona.reconstruction.affinity import DomainAffinity, perplexity_affinity, score_affinity
from pomona.reconstruction.calibrate import ChannelStats, calibrate
from pomona.reconstruction.cluster import Clusters, cluster, random_groups, refine
from pomona.reconstruction.estimate import Estimate, estimate
from pomona.reconstruction.experts import layer_experts
from pomona.reconstruction.ffn import DenseModel, dense_model, mean_hidden
from pomona.reconstruction.planners import Calibration
from pomona.reconstruction.result import Reconstruction
from pomona.reconstruction.retraining import Retraining, StageState, retrain
from pomona.reconstruction.scores import score_layers
from pomona.reconstruction.settings import ReconstructSettings
from pomona.reconstruction.windows import Windows, draw_windows, equal_shares
from pomona.shapes import Tokens

__all__ = ["Estimate", "ReconstructSettings", "Reconstruction", "preview", "reconstruct"]

_HERE = Placement()


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
    placement: Placement = _HERE,
) -> Reconstruction:
    """Make a mixture of experts of the dense checkpoint `model`, a folder or a Hub id.

    `domains` maps names to documents (`ReconstructSettings.split_domains` if they are few); `text` is
    what to retrain on, the domains' own if None. `placement` says where the weights lie meanwhile.
    `out` must be new or empty; it appears whole or not at all. With retraining, what is done so far is
    kept in `.OUT.work`, and the same call goes on from there. Raises `PomonaError` naming what is wrong
    with the model, a domain or the disk.
    """
    _check_out(out)
    settings.check_domains(list(domains))
    checkpoint = Checkpoint.open(checkpoint_folder(model))
    _check_fits(checkpoint, settings)
    documents = [document for own in domains.values() for document in own]
    documents = list(text) if text is not None else documents
    identity = {
        "weights": checkpoint_digests(checkpoint.folder),
        "domains": {name: digest(own) for name, own in domains.items()},
        "text": digest(documents),
        "settings": settings.to_json(),
    }
    with Workspace.open(out, identity) as work:
        if settings.retrain is None:
            made = _assemble(str(model), checkpoint, domains, out, settings, progress, placement)
        else:
            if not work.mixture.is_dir():
                given = (work.mixture, settings, progress, placement)
                _assemble(str(model), checkpoint, domains, *given)
            how = settings.retrain
            made = _retrain(model, documents, work, out, settings, how, progress, placement)
        work.remove()
    return made


def preview(
    model: str | Path,
    domains: Sequence[str],
    settings: ReconstructSettings,
    placement: Placement = _HERE,
) -> Estimate:
    """Return what `reconstruct` would make and what it would cost, without making it.

    The model's config.json is enough. Raises `PomonaError` where settings and model do not fit.
    """
    settings.check_domains(domains)
    checkpoint = outline_checkpoint(model)
    family = dense_family(checkpoint)
    dense = outline_model(model, settings.dtype)
    shapes = {name: tuple(weight.shape) for name, weight in dense.named_parameters()}
    told = estimate(shapes, family, settings, len(domains), placement)
    container_of(family, told.sizes).config(checkpoint.config, told.sizes)
    for how in (settings, settings.retrain):
        if how is not None:
            _check_length(how.length, context_length(dense), checkpoint.folder)
    return told


def _retrain(
    model: str | Path,
    documents: Sequence[str],
    work: Workspace,
    out: Path,
    settings: ReconstructSettings,
    how: Retraining,
    progress: Progress,
    placement: Placement,
) -> Reconstruction:
    """Retrain the mixture in the workspace and write it to `out`, merged."""
    device = placement.torch_device()
    student = moved(load_model(work.mixture, how.dtype), device)
    stored = Checkpoint.open(work.mixture).dtype()
    teacher = None
    if how.objective.loss == "distil":
        teacher = moved(load_model(checkpoint_folder(model), how.dtype), device)
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
    moved(student, stored)
    write_retrained(out, student, work.mixture, str(model), made, settings, history)
    return made


def _assemble(
    model: str,
    checkpoint: Checkpoint,
    domains: Mapping[str, Sequence[str]],
    out: Path,
    settings: ReconstructSettings,
    progress: Progress,
    placement: Placement,
) -> Reconstruction:
    """Write the mixture as calibration leaves it."""
    family = dense_family(checkpoint)
    with placed(checkpoint, family, settings.dtype, placement) as base:
        _check_length(settings.length, context_length(base), checkpoint.folder)
        freeze(base)
        dense = dense_model(base, family, checkpoint)
        width = settings.width(dense.channels)
        windows = draw_windows(checkpoint.folder, domains, settings)
        calibration = _calibrate(dense, windows.calibration, settings, progress)
        kept = width + settings.planner.shared_channels(dense.channels, settings.experts, width)
        groups = _group(calibration, windows, kept, settings, progress)
        plan = settings.planner(
            calibration, groups.names, settings.score, width, settings.active, settings.seed
        )
        shares = [equal_shares(calibration.windows, group) for group in plan.groups]
        at_once = placement.at_once(len(dense.ffns))
        experts = layer_experts(dense, shares, plan, settings, at_once, progress)
        return write_mixture(
            out,
            model,
            checkpoint,
            plan,
            experts,
            groups.affinity,
            groups.clusters,
            settings,
            placement.shard_bytes,
        )


def _calibrate(
    dense: DenseModel,
    windows: Mapping[str, Tokens],
    settings: ReconstructSettings,
    progress: Progress,
) -> Calibration:
    """Split domains where there are fewer than experts, gather statistics."""
    if settings.grouping == "affinity":
        windows = refine(windows, lambda own_BT: mean_hidden(dense, own_BT), settings.experts)
    if settings.score.gradients and dense.downs[0].weight.device.type == "meta":
        raise PomonaError(
            "the score taylor needs a backward pass, which offloaded weights cannot give"
        )
    stats: dict[str, list[ChannelStats]] = {}
    for done, (name, windows_BT) in enumerate(windows.items()):
        progress("calibrating", done, len(windows))
        stats[name] = calibrate(dense, windows_BT, settings.score.gradients)
    progress("calibrating", len(windows), len(windows))
    return Calibration(dense, windows, stats)


def _group(
    calibration: Calibration,
    windows: Windows,
    kept: int,
    settings: ReconstructSettings,
    progress: Progress,
) -> _Groups:
    """Group the domains; an expert has `kept` channels for a token, its own and the shared ones."""
    names = tuple(calibration.stats)
    compared_by = settings.compared_by(len(windows.calibration))
    if settings.grouping == "random" and settings.experts > 1:
        return _Groups(random_groups(names, settings.experts, settings.seed))
    if compared_by is None:
        return _Groups((names,) * settings.experts)
    scores = [
        score_layers(settings.score, own, calibration.dense) for own in calibration.stats.values()
    ]
    if compared_by == "scores":
        affinity = score_affinity(names, scores)
    else:
        affinity = perplexity_affinity(
            calibration.dense,
            names,
            scores,
            list(windows.affinity.values()),
            kept,
            settings.correlate,
            progress,
        )
    clusters = cluster(affinity, settings.experts, settings.linkage)
    return _Groups(clusters.groups, affinity, clusters)


def _check_out(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise PomonaError(f"{out} exists and is not empty; choose a new folder")
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(out, error) from error


def _check_fits(checkpoint: Checkpoint, settings: ReconstructSettings) -> None:
    """Raise what the settings and the model cannot do together before anything is computed."""
    family = dense_family(checkpoint)
    channels = checkpoint.shape(f"{family.mlp.format(layer=0)}.down_proj.weight")[1]
    sizes = settings.sizes(channels)
    container_of(family, sizes).config(checkpoint.config, sizes)


def _check_length(length: int, context: int, folder: Path) -> None:
    if length > context:
        raise PomonaError(
            f"windows of {length} tokens are longer than the context of {folder}, {context} tokens; "
            "make length smaller"
        )
