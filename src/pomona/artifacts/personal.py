"""A model to look at: a checkpoint, with a client's adapter and graft where they are given."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pomona.artifacts.graft_format import read_graft
from pomona.artifacts.origin import check_base
from pomona.artifacts.shared_format import EXPERT, AdapterFolder, read_shared
from pomona.errors import PomonaError
from pomona.federation.cohort import FrozenBase
from pomona.federation.graft import Graft, check_count, init_graft, selected_experts
from pomona.federation.shared_expert import SharedExpert
from pomona.federation.update import ClientState, stack
from pomona.models.experts import ExpertSite, find_expert_sites, freeze
from pomona.models.loading import load_model
from pomona.models.peft_format import read_adapter
from pomona.models.placement import find_device, moved


@dataclass(frozen=True)
class PersonalModel:
    """A model as it lies on disk: a folder or Hub id, and the folders of a client's parts.

    Without parts it is the base itself. `device` is where it is to compute, "auto" for a GPU if there is one.
    """

    source: str
    adapter: Path | None = None
    graft: Path | None = None
    personal: Path | None = None
    device: str = "auto"

    @property
    def parts(self) -> list[Path]:
        """The folders of the client's parts, as many as there are."""
        return [p for p in (self.adapter, self.graft, self.personal) if p is not None]


def open_personal(personal: PersonalModel) -> tuple[FrozenBase, ClientState]:
    """Load the model in float32, frozen, and what `FrozenBase.attach_one` hangs on it.

    Raises `PomonaError` when a part does not belong to the model.
    """
    return put_on(load_base(personal.source, personal.device), personal)


def load_personal(
    base: str | Path,
    graft: str | Path | None = None,
    adapter: str | Path | None = None,
    personal: str | Path | None = None,
    device: str = "auto",
) -> PreTrainedModel:
    """Return a transformers model with a client's parts on it: it generates, and it trains.

    `base` is a checkpoint folder or Hub id; the others are folders that a federation has written. The parts are
    parameters of the model's `personal_parts`, whose gradients are on; the base is frozen. `save_pretrained`
    writes the base alone; `pomona export` writes both. Raises `PomonaError` when a part does not belong to it.
    """
    folders = [None if path is None else Path(path) for path in (adapter, graft, personal)]
    whole = PersonalModel(str(base), folders[0], folders[1], folders[2], device)
    frozen, state = open_personal(whole)
    stacked = stack([replace(state, memory={})]).to(frozen.device)
    parts = nn.ParameterDict()

    def one(kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        own = dict(tensors)
        for name, value in tensors.items():
            if value.is_floating_point():
                own[name] = parts[f"{kind}/{name}".replace(".", "/")] = nn.Parameter(value)
        return own

    kinds = ("adapter", "graft", "personal")
    frozen.attach(ClientState(*(one(kind, getattr(stacked, kind)) for kind in kinds)))
    model = frozen.model
    model.personal_parts = parts
    known = getattr(model, "_keys_to_ignore_on_save", None) or ()
    ours = (f"personal_parts.{name}" for name in parts)
    setattr(model, "_keys_to_ignore_on_save", {*known, *ours})  # noqa: B010 - transformers' own
    return model


def clients_of_run(run: Path, base: PersonalModel) -> dict[str, PersonalModel]:
    """Return every client's personal model as a finished run has published it.

    Raises `PomonaError` for a folder that holds none.
    """
    shared = run / "shared"
    folders = sorted(path for path in (run / "clients").glob("*") if path.is_dir())
    if not folders and not shared.is_dir():
        raise PomonaError(
            f"{run} holds no personal models; give the run folder of a finished federation"
        )
    found: dict[str, PersonalModel] = {}
    for folder in folders:
        adapter = next((p for p in (folder / "adapter", shared) if p.is_dir()), None)
        graft, personal = (
            own if (own := folder / part).is_dir() else None for part in ("graft", "personal")
        )
        found[folder.name] = replace(base, adapter=adapter, graft=graft, personal=personal)
    if shared.is_dir() and not folders:
        found["shared"] = replace(base, adapter=shared)
    return found


def load_base(source: str, device: str = "auto") -> PreTrainedModel:
    """Load a model in float32, frozen, for as many clients' parts as there are."""
    model = moved(load_model(source, "float32"), find_device(device))
    freeze(model)
    return model


def put_on(model: PreTrainedModel, personal: PersonalModel) -> tuple[FrozenBase, ClientState]:
    """Read a client's parts for a base that is loaded; see `open_personal`."""
    source, adapter, graft = personal.source, personal.adapter, personal.graft
    read = AdapterFolder() if adapter is None else read_shared(adapter)
    settings, private = (None, {}) if graft is None else read_graft(graft)
    own_lora, own = (None, {}) if personal.personal is None else read_adapter(personal.personal)
    sites = tuple(find_expert_sites(model)) if settings or read.expert else ()
    if adapter is not None and read.expert is not None:
        _check_graft(read.expert, read.grown, sites, adapter / EXPERT, source)
    if graft is not None and settings is not None:
        _check_graft(settings, private, sites, graft, source)
    base = FrozenBase(model, read.lora, settings, sites, own_lora, _together(read, sites))
    if adapter is not None:
        _check_fits(read.adapter, base.init_adapter(0), adapter, source)
    if personal.personal is not None:
        _check_fits(own, base.init_personal(0, ""), personal.personal, source)
    check_base(personal.parts, base, source, private)
    if adapter is not None and read.expert is not None:
        check_base([adapter / EXPERT], base, source, read.grown)
    return base, ClientState(read.adapter, private, own)


def _together(read: AdapterFolder, sites: Sequence[ExpertSite]) -> SharedExpert | None:
    if read.expert is None:
        return None
    return SharedExpert(read.expert, tuple(map(tuple, selected_experts(sites, read.grown))))


def _check_fits(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], folder: Path, source: str
) -> None:
    """Compare names and shapes with a newborn's, the first difference is named."""
    for name in sorted({*tensors, *expected}):
        found, wanted = (list(t[name].shape) if name in t else None for t in (tensors, expected))
        if found != wanted:
            raise PomonaError(
                f'{folder} does not belong to {source}: the tensor "{name}" is '
                f"{_shape(found)} there and for the model {_shape(wanted)}"
            )


def _check_graft(
    graft: Graft,
    tensors: Mapping[str, Tensor],
    sites: Sequence[ExpertSite],
    folder: Path,
    source: str,
) -> None:
    """Compare with a newborn of the folder's settings, and the experts it grew from with the sites."""
    try:
        check_count(sites, graft)
    except PomonaError as error:
        raise PomonaError(f"{folder} does not belong to {source}: {error}") from error
    newborn = init_graft(sites, graft, [range(graft.count)] * len(sites), torch.Generator())
    _check_fits(tensors, newborn, folder, source)
    for site, chosen in zip(sites, selected_experts(sites, tensors), strict=True):
        wrong = next((e for e in chosen if not 0 <= e < site.num_experts), None)
        if wrong is not None:
            raise PomonaError(
                f"{folder} does not belong to {source}: it grew from expert {wrong} of "
                f"{site.name}, which has {site.num_experts}"
            )


def _shape(size: list[int] | None) -> str:
    return "absent" if size is None else f"of shape {size}"
