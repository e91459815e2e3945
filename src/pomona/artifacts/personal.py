"""A model to look at: a checkpoint, with a client's adapter and graft where they are given."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from pomona.artifacts.graft_format import read_graft
from pomona.artifacts.origin import check_base
from pomona.errors import PomonaError
from pomona.federation.cohort import FrozenBase
from pomona.federation.graft import check_count, selected_experts
from pomona.federation.update import ClientState
from pomona.models.experts import ExpertSite, find_expert_sites, freeze
from pomona.models.loading import load_model
from pomona.models.lora import LoRA
from pomona.models.peft_format import read_adapter


@dataclass(frozen=True)
class PersonalModel:
    """A model as it lies on disk: a folder or Hub id, and the folders of a client's parts.

    Without parts it is the base itself.
    """

    source: str
    adapter: Path | None = None
    graft: Path | None = None
    personal: Path | None = None

    @property
    def parts(self) -> list[Path]:
        """The folders of the client's parts, as many as there are."""
        return [p for p in (self.adapter, self.graft, self.personal) if p is not None]


def open_personal(personal: PersonalModel) -> tuple[FrozenBase, ClientState]:
    """Load the model in float32, frozen, and what `FrozenBase.attach_one` hangs on it.

    Raises `PomonaError` when a part does not belong to the model.
    """
    source, adapter, graft = personal.source, personal.adapter, personal.graft
    model = load_model(source, "float32")
    freeze(model)
    lora, shared = (LoRA(), {}) if adapter is None else read_adapter(adapter)
    settings, private = (None, {}) if graft is None else read_graft(graft)
    sites = () if graft is None else tuple(find_expert_sites(model))
    own_lora, own = (None, {}) if personal.personal is None else read_adapter(personal.personal)
    base = FrozenBase(model, lora, settings, sites, own_lora)
    if adapter is not None:
        _check_fits(shared, base.init_adapter(0), adapter, source)
    if graft is not None:
        _check_fits(private, _any_graft(base, graft, source), graft, source)
        _check_experts(private, sites, graft, source)
    if personal.personal is not None:
        _check_fits(own, base.init_personal(0, ""), personal.personal, source)
    check_base(personal.parts, base, source, private)
    return base, ClientState(shared, private, own)


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


def _any_graft(base: FrozenBase, folder: Path, source: str) -> dict[str, Tensor]:
    """Return a newborn graft with the folder's settings: the names and shapes that fit the base."""
    assert base.graft is not None
    try:
        check_count(base.sites, base.graft)
    except PomonaError as error:
        raise PomonaError(f"{folder} does not belong to {source}: {error}") from error
    return base.init_graft(0, "", [[0] * base.graft.count] * len(base.sites))


def _check_experts(
    graft: Mapping[str, Tensor], sites: Sequence[ExpertSite], folder: Path, source: str
) -> None:
    for site, chosen in zip(sites, selected_experts(sites, graft), strict=True):
        wrong = next((e for e in chosen if not 0 <= e < site.num_experts), None)
        if wrong is not None:
            raise PomonaError(
                f"{folder} does not belong to {source}: it grew from expert {wrong} of "
                f"{site.name}, which has {site.num_experts}"
            )


def _shape(size: list[int] | None) -> str:
    return "absent" if size is None else f"of shape {size}"
