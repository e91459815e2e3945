"""The adapter before the first round, and who begins with which part of it."""

from collections.abc import Mapping

import torch
from torch import Tensor

from pomona.artifacts.shared_format import read_shared
from pomona.errors import PomonaError
from pomona.federation.cohort import FrozenBase
from pomona.federation.graft import Graft
from pomona.federation.settings import FederateSettings
from pomona.federation.strategies import Corrects, Strategy
from pomona.federation.update import ClientState, split


def dealt(
    strategy: Strategy, adapter: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], ClientState]:
    """Return of a first adapter what the server has, and what every client does: its part, its memory."""
    own = split(ClientState(adapter), strategy.shares)[1].adapter
    shared = {name: value for name, value in adapter.items() if name not in own}
    memory = strategy.birth(shared) if isinstance(strategy, Corrects) else {}
    return shared, ClientState(own, memory=memory)


def first_adapter(settings: FederateSettings, base: FrozenBase) -> dict[str, Tensor]:
    """Return the adapter before the first round: a newborn, or the one of `warm_start`.

    Raises `PomonaError` when that one is not as the recipe has it.
    """
    newborn = base.init_adapter(settings.seed)
    if settings.warm_start is None:
        return newborn
    read = read_shared(settings.warm_start)
    lora, tensors = read.lora, read.adapter
    shapes = {name: value.shape for name, value in tensors.items()}
    expected = {name: value.shape for name, value in newborn.items()}
    same = lora.scaling == settings.adapter.scaling and shapes == expected
    if not (same and _same_expert(base, read.expert, read.grown)):
        expert = "one" if read.expert else "no"
        raise PomonaError(
            f"warm_start {settings.warm_start} is no adapter as the recipe has it: it has rank {lora.rank}, "
            f"alpha {lora.alpha:g}, targets {', '.join(lora.targets)} and {expert} shared expert; give "
            "the same in [adapter] and [shared_expert]"
        )
    return {name: tensors[name].float() for name in newborn}


def _same_expert(base: FrozenBase, graft: Graft | None, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a shared expert that was read computes what the recipe's does, from the same experts."""
    expert = base.shared_expert
    if graft is None or expert is None:
        return graft is expert
    ours = expert.graft
    told = [
        (g.form, g.gate if not g.trains_gate else "", g.weights, g.scaling) for g in (graft, ours)
    ]
    indices = expert.indices(base.sites)
    return told[0] == told[1] and all(torch.equal(tensors[n], indices[n]) for n in indices)
