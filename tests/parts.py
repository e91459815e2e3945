"""A client's parts as a federation would have published them, with random weights that do something."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pomona.artifacts.origin import origin_of
from pomona.artifacts.personal import PersonalModel, load_base
from pomona.artifacts.publish import publish_client, publish_shared
from pomona.data.templates import Alpaca
from pomona.federation.cohort import FrozenBase
from pomona.federation.graft import Graft
from pomona.federation.selection import SameExpert
from pomona.federation.shared_expert import SharedGraft
from pomona.federation.update import ClientState
from pomona.models.experts import find_expert_sites
from pomona.models.lora import LoRA

SELECTION = SameExpert(1)
LORA, GRAFT = LoRA(2, 4.0), Graft(SELECTION, rank=2)


@dataclass(frozen=True)
class Form:
    """What a client has."""

    lora: LoRA = LORA
    graft: Graft | None = GRAFT
    personal: LoRA | None = None
    shared_expert: SharedGraft | None = None


def published(
    source: Path, run: Path, form: Form, names=("pears",), scale: float = 0.3
) -> dict[str, PersonalModel]:
    """Write the parts of clients into a run folder and return their personal models."""
    model = load_base(str(source), "cpu")
    sites = tuple(find_expert_sites(model))
    expert = form.shared_expert and form.shared_expert.on(model, sites)
    base = FrozenBase(model, form.lora, form.graft, sites, form.personal, expert)
    origin = origin_of(base, str(source), Alpaca(), 96)
    generator = torch.Generator().manual_seed(0)

    def moved(tensors):
        return {
            n: v + scale * torch.randn(v.shape, generator=generator) if v.is_floating_point() else v
            for n, v in tensors.items()
        }

    adapter = moved(base.init_adapter(0))
    publish_shared(run, base, adapter, origin)
    found = {}
    for name in names:
        count = form.graft.count if form.graft else 0
        experts = [[1 + i for i in range(count)] for _ in sites]
        grown = moved(base.init_graft(0, name, experts)) if form.graft else {}
        own = ClientState({}, grown, moved(base.init_personal(0, name)))
        publish_client(run, name, base, own, origin)
        folder = run / "clients" / name
        graft, personal = (p if (p := folder / k).is_dir() else None for k in ("graft", "personal"))
        whole = PersonalModel(str(source), run / "shared", graft, personal, "cpu")
        found[name] = whole
    return found


def without(personal: PersonalModel, *kinds: str) -> PersonalModel:
    return replace(personal, **dict.fromkeys(kinds))
