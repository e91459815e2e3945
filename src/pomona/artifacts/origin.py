"""pomona.json beside an adapter or a graft: which base it belongs to, how its rows were asked.

PEFT passes over the file, and a folder without it, made by PEFT alone, is taken as it is.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

import pomona
from pomona.data.templates import TEMPLATES, Template
from pomona.data.templates.record import template_from, template_table
from pomona.errors import PomonaError
from pomona.federation.cohort import FrozenBase
from pomona.federation.graft import selected_experts
from pomona.files import damaged, read_as
from pomona.models.experts import expert_sites_if_any
from pomona.models.fingerprint import base_fingerprint, experts_fingerprint

ORIGIN = "pomona.json"


@dataclass(frozen=True)
class Origin:
    """What an adapter or a graft was trained on, and how.

    `model` is a path or Hub id, `base` the `base_fingerprint` of it; a graft adds "selected", the
    fingerprint of the experts it grew from. `template` is a kind with its fields, `max_length` in tokens,
    `dtype` that of the base.
    """

    model: str
    base: dict[str, str]
    template: dict[str, Any]
    max_length: int
    dtype: str

    def to_json(self) -> dict[str, Any]:
        """Return what pomona.json holds."""
        return {"pomona": pomona.__version__, **asdict(self)}


def origin_of(base: FrozenBase, model: str, template: Template, max_length: int) -> Origin:
    """Return what is to be said of an adapter that was trained on `base`."""
    dtype = str(base.model.dtype).removeprefix("torch.")
    return Origin(model, _fingerprint(base), template_table(template), max_length, dtype)


def origin_of_graft(origin: Origin, base: FrozenBase, graft: Mapping[str, Tensor]) -> Origin:
    """Return the same for one client's graft: the experts it grew from are told too."""
    return replace(origin, base={**origin.base, **_selected(base, graft)})


def read_origin(folder: Path) -> Origin | None:
    """Return what a folder tells of itself, or None; raises `PomonaError` when that is damaged."""
    path = folder / ORIGIN
    return read_as(path, Origin) if path.is_file() else None


def check_base(
    folders: Sequence[Path], base: FrozenBase, source: str, graft: Mapping[str, Tensor]
) -> None:
    """Compare the fingerprints that adapter and graft folders hold with those of the loaded base.

    `source` names the model, `graft` holds the graft's tensors, if there is one. Raises `PomonaError`
    naming the folder, both models and what differs; a folder without a fingerprint is accepted.
    """
    origins = {folder: origin for folder in folders if (origin := read_origin(folder))}
    found = {**_fingerprint(base), **_selected(base, graft)} if origins else {}
    for folder, origin in origins.items():
        for part, digest in sorted(origin.base.items()):
            if found.get(part) != digest:
                told = "experts it grew from" if part == "selected" else part
                raise PomonaError(
                    f"{folder} does not belong to {source}: it was trained on {origin.model}, whose "
                    f"{told} had other weights; give the model it was trained on"
                )


def prompt_for(name: str | None, folders: Sequence[Path], note: Callable[[str], None]) -> Template:
    """Return the template for rows: the one called `name`, or that of adapter and graft, or Alpaca's.

    Of the recorded kind the recorded fields are taken too. `note` is told when rows are asked otherwise
    than in training. Raises `PomonaError` for an unknown name, for folders that were trained
    differently, and for one whose template is not Pomona's own, unless a name decides.
    """
    if name is not None and name not in TEMPLATES:
        raise PomonaError(f'unknown template "{name}"; there are {", ".join(TEMPLATES)}')
    origins = {folder: origin for folder in folders if (origin := read_origin(folder))}
    if not origins:
        return TEMPLATES[name or "alpaca"]()
    (first, origin), *others = origins.items()
    same = next((f for f, other in others if other.template != origin.template), None) is None
    if name is None and not same:
        raise PomonaError(
            f"{first} and {others[0][0]} were trained with different templates; say which one with "
            "--template"
        )
    if same and name in (None, origin.template.get("kind")):
        return _recorded(first, origin)
    for folder, other in origins.items():
        if other.template.get("kind") != name:
            kind = other.template.get("kind")
            note(f'{folder} was trained with the template "{kind}"; rows are asked with "{name}"')
    return TEMPLATES[str(name)]()


def _recorded(folder: Path, origin: Origin) -> Template:
    try:
        return template_from(origin.template)
    except ValueError as error:
        if ":" in str(origin.template.get("kind")):
            raise PomonaError(f"{folder}: {error}; choose one of them with --template") from error
        raise damaged(folder / ORIGIN, error) from error


def _fingerprint(base: FrozenBase) -> dict[str, str]:
    return base_fingerprint(base.model, base.sites or expert_sites_if_any(base.model))


def _selected(base: FrozenBase, graft: Mapping[str, Tensor]) -> dict[str, str]:
    if not graft:
        return {}
    chosen = selected_experts(base.sites, graft)
    sites = [site for site, own in zip(base.sites, chosen, strict=True) for _ in own]
    return {"selected": experts_fingerprint(sites, [expert for own in chosen for expert in own])}
