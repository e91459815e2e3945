"""Reconstruct: a dense language model becomes a mixture of experts.

DIVE (Feng et al., ACL 2025, arXiv 2506.09351): calibrate → score → affinity → cluster → plan →
compensate → route → assemble. Out comes a stock Mixtral checkpoint.
"""

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from pomona.artifacts.model_card import mixture_card
from pomona.data.texts import sample_windows
from pomona.errors import PomonaError
from pomona.files import atomic_folder, write_json, write_text
from pomona.models.dense import dense_family
from pomona.models.experts import freeze
from pomona.models.loading import (
    checkpoint_folder,
    context_length,
    load_model,
    load_tokenizer,
)
from pomona.models.weights import Checkpoint, write_sharded
from pomona.progress import Progress, silent
from pomona.reconstruction.affinity import (
    AffinityKind,
    DomainAffinity,
    perplexity_affinity,
    score_affinity,
)
from pomona.reconstruction.assemble import mixture_tensors
from pomona.reconstruction.calibrate import ChannelStats, calibrate
from pomona.reconstruction.cluster import Clusters, Linkage, check_enough_domains, cluster
from pomona.reconstruction.compensate import COMPENSATIONS, Compensation, Ridge
from pomona.reconstruction.ffn import DenseModel, dense_model
from pomona.reconstruction.plan import ExpertPlan, plan_experts
from pomona.reconstruction.router import ROUTERS, Fitted, Router
from pomona.reconstruction.scores import SCORES, WIFV, Score, score_layers
from pomona.shapes import PerLayerChannel, Tokens

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
class ReconstructSettings:
    """How a dense model is taken apart and put together again.

    `keep` is the share of FFN channels per expert; `active` experts serve a token, so a token sees
    `keep · active` of the dense width. `windows` of `length` tokens calibrate each domain;
    `affinity_windows` others measure each pruned model when `affinity` is "perplexity".
    """

    experts: int = 8
    active: int = 2
    keep: float = 0.25
    windows: int = 1024
    length: int = 256
    score: Score = field(default_factory=WIFV)
    affinity: AffinityKind = "perplexity"
    affinity_windows: int = 32
    linkage: Linkage = "average"
    compensation: Compensation = field(default_factory=Ridge)
    router: Router = field(default_factory=Fitted)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.experts < 2:
            raise PomonaError(f"experts {self.experts} make no mixture; use 2 or more")
        if not 1 <= self.active <= self.experts:
            raise PomonaError(f"active {self.active} is not between 1 and experts {self.experts}")
        if not 0 < self.keep <= 1:
            raise PomonaError(
                f"keep {self.keep} is not a share between 0 and 1; use for example 0.25"
            )
        for name in ("windows", "length", "affinity_windows"):
            if getattr(self, name) < 2:
                raise PomonaError(f"{name} {getattr(self, name)} is too small; use 2 or more")
        for name, kinds in (("affinity", AffinityKind), ("linkage", Linkage)):
            if getattr(self, name) not in get_args(kinds):
                known = ", ".join(get_args(kinds))
                raise PomonaError(f'{name} "{getattr(self, name)}" is unknown; use one of {known}')

    def to_json(self) -> dict[str, Any]:
        """Return every setting; a score, compensation or router as its kind and its own fields."""
        return {name: _plain(value) for name, value in vars(self).items()}


@dataclass(frozen=True)
class Reconstruction:
    """What was made: where, from what, and how large."""

    out: Path
    plan: ExpertPlan = field(repr=False)
    affinity: DomainAffinity = field(repr=False)
    clusters: Clusters = field(repr=False)
    total_parameters: int
    active_parameters: int
    dense_parameters: int

    def __str__(self) -> str:
        layers, experts, width = self.plan.keep_LEW.shape
        lines = [
            f"{layers} layers of {experts} experts, {width} of {self.plan.channels} channels each",
            f"{self.total_parameters:,} parameters, {self.active_parameters:,} active per token "
            f"(dense: {self.dense_parameters:,})",
            *(f"expert {e}: {', '.join(group)}" for e, group in enumerate(self.plan.groups)),
        ]
        return "\n".join(lines)


def reconstruct(
    model: str | Path,
    domains: Mapping[str, Sequence[str]],
    out: Path,
    settings: ReconstructSettings,
    progress: Progress = silent,
) -> Reconstruction:
    """Make a mixture of experts of the dense checkpoint in the folder `model`.

    `domains` maps names to documents. `out` must be new or empty; it appears whole or not at all.
    Raises `PomonaError` naming what is wrong with the model, a domain or the disk.
    """
    _check_out(out)
    check_enough_domains(list(domains), settings.experts)
    checkpoint = Checkpoint.open(checkpoint_folder(model))
    family = dense_family(checkpoint)
    base = load_model(checkpoint.folder, "float32")
    _check_length(settings.length, context_length(base), checkpoint.folder)
    freeze(base)
    dense = dense_model(base, family)
    width = _width(settings.keep, dense.channels)
    windows = _windows(checkpoint.folder, domains, settings, settings.windows, "calibration")

    stats: dict[str, list[ChannelStats]] = {}
    for done, (name, windows_BT) in enumerate(windows.items()):
        progress("calibrating", done, len(windows))
        stats[name] = calibrate(dense, windows_BT)
    progress("calibrating", len(windows), len(windows))
    scores = [score_layers(settings.score, own, dense) for own in stats.values()]
    affinity = _affinity(checkpoint.folder, dense, domains, scores, width, settings, progress)
    clusters = cluster(affinity, settings.experts, settings.linkage)
    plan = plan_experts(dense, stats, clusters.groups, settings.score, width)

    grouped = [_share(windows, group) for group in plan.groups]
    per_expert: list[Sequence[Tensor]] = []
    for expert, windows_BT in enumerate(grouped):
        progress("compensating", expert, len(grouped))
        per_expert.append(settings.compensation(dense, windows_BT, plan.keep_LEW[:, expert]))
    progress("compensating", len(grouped), len(grouped))
    downs = list(zip(*per_expert, strict=True))
    progress("routing", 0, 1)
    routers = settings.router(dense, grouped, plan.keep_LEW, downs, settings.seed)
    progress("routing", 1, 1)

    config = family.container(checkpoint.config, settings.experts, settings.active, width)
    with atomic_folder(out) as partial:
        tensors = mixture_tensors(checkpoint, family, plan.keep_LEW, downs, routers)
        sizes = _Sizes()
        write_sharded(partial, sizes.counted(tensors))
        write_json(partial / "config.json", config)
        for name in _TOKENIZER_FILES:
            if (checkpoint.folder / name).is_file():
                shutil.copyfile(checkpoint.folder / name, partial / name)
        made = Reconstruction(
            out,
            plan,
            affinity,
            clusters,
            sizes.total,
            sizes.total - sizes.experts * (settings.experts - settings.active) // settings.experts,
            sum(p.numel() for p in base.parameters()),
        )
        _write_records(partial / "reconstruction", made, settings)
        write_text(partial / "README.md", mixture_card(str(model), made, settings))
    return made


class _Sizes:
    """Counts parameters as they stream by."""

    def __init__(self) -> None:
        self.total = 0
        self.experts = 0

    def counted(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors:
            self.total += tensor.numel()
            self.experts += tensor.numel() if ".experts." in name else 0
            yield name, tensor


def _affinity(
    folder: Path,
    dense: DenseModel,
    domains: Mapping[str, Sequence[str]],
    scores: Sequence[PerLayerChannel],
    width: int,
    settings: ReconstructSettings,
    progress: Progress,
) -> DomainAffinity:
    if settings.affinity == "scores":
        return score_affinity(list(domains), scores)
    held = _windows(folder, domains, settings, settings.affinity_windows, "affinity")
    return perplexity_affinity(dense, list(domains), scores, list(held.values()), width, progress)


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
    """Give every domain of a group an equal share of the group's windows (DIVE, section 3.2)."""
    each = max(1, len(windows[group[0]]) // len(group))
    return torch.cat([windows[domain][:each] for domain in group])


def _plain(value: Any) -> Any:
    """Return a setting as JSON; what a registry holds goes by its name there."""
    if not is_dataclass(value) or isinstance(value, type):
        return value
    registered = (*SCORES.items(), *COMPENSATIONS.items(), *ROUTERS.items())
    outside = f"{type(value).__module__}:{type(value).__name__}"
    kind = next((name for name, member in registered if member is type(value)), outside)
    return {"kind": kind, **asdict(value)}


def _write_records(folder: Path, made: Reconstruction, settings: ReconstructSettings) -> None:
    """Write how it was made, as JSON one can read."""
    folder.mkdir()
    write_json(folder / "settings.json", settings.to_json())
    matrix = made.affinity.perplexity_MM
    write_json(folder / "plan.json", made.plan.to_json())
    write_json(
        folder / "affinity.json",
        {
            "kind": settings.affinity,
            "domains": list(made.affinity.domains),
            "perplexity": None if matrix is None else matrix.tolist(),
            "correlation": made.affinity.correlation_MM.tolist(),
        },
    )
    write_json(
        folder / "clusters.json",
        {
            "linkage": settings.linkage,
            "experts": [list(group) for group in made.clusters.groups],
            "tree": made.clusters.tree,
        },
    )


def _check_out(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise PomonaError(f"{out} exists and is not empty; choose a new folder")


def _width(keep: float, channels: int) -> int:
    width = round(keep * channels)
    if width < 1:
        raise PomonaError(
            f"keep {keep} of {channels} channels leaves an expert none; make keep larger"
        )
    return width


def _check_length(length: int, context: int, folder: Path) -> None:
    if length > context:
        raise PomonaError(
            f"windows of {length} tokens are longer than the context of {folder}, {context} tokens; "
            "make length smaller"
        )
