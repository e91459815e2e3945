"""Before the first round: every client chooses its experts and gives birth to what is private."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from pomona.artifacts.run import Snapshot
from pomona.artifacts.shared_format import read_shared
from pomona.data.examples import collate
from pomona.errors import PomonaError
from pomona.federate.evaluate import loss_line, measured
from pomona.federate.prepare import Federation
from pomona.federation.graft import Graft, choose_experts
from pomona.federation.strategies import Corrects, Strategy
from pomona.federation.update import ClientState, split
from pomona.seeds import seed_of


def begin(federation: Federation) -> Snapshot:
    """Choose every client's experts, give birth to its private state, measure the untuned base."""
    settings, base = federation.settings, federation.base
    strategy = settings.strategy
    shared, own = dealt(strategy, _first_adapter(federation))
    clients: dict[str, ClientState] = {}
    for done, name in enumerate(federation.train):
        federation.progress("grafting", done, len(federation.train))
        graft = base.init_graft(settings.seed, name, _select(federation, name))
        personal = base.init_personal(settings.seed, name)
        clients[name] = replace(own, graft=graft, personal=personal)
    federation.progress("grafting", len(clients), len(clients))
    metrics = [
        loss_line(0, "base", name, measured(federation, name, ClientState()))
        for name in federation.test
    ]
    return federation.run.commit(None, 0, strategy.init(shared), clients, metrics)


def dealt(
    strategy: Strategy, adapter: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], ClientState]:
    """Return of a first adapter what the server has, and what every client does: its part, its memory."""
    own = split(ClientState(adapter), strategy.shares)[1].adapter
    shared = {name: value for name, value in adapter.items() if name not in own}
    memory = strategy.birth(shared) if isinstance(strategy, Corrects) else {}
    return shared, ClientState(own, memory=memory)


def _first_adapter(federation: Federation) -> dict[str, Tensor]:
    """Return the adapter before the first round: a newborn, or the one of `warm_start`."""
    settings = federation.settings
    newborn = federation.base.init_adapter(settings.seed)
    if settings.warm_start is None:
        return newborn
    read = read_shared(settings.warm_start)
    lora, tensors = read.lora, read.adapter
    shapes = {name: value.shape for name, value in tensors.items()}
    expected = {name: value.shape for name, value in newborn.items()}
    same = lora.scaling == settings.adapter.scaling and shapes == expected
    if not (same and _same_expert(federation, read.expert, read.grown)):
        expert = "one" if read.expert else "no"
        raise PomonaError(
            f"warm_start {settings.warm_start} is no adapter as the recipe has it: it has rank {lora.rank}, "
            f"alpha {lora.alpha:g}, targets {', '.join(lora.targets)} and {expert} shared expert; give "
            "the same in [adapter] and [shared_expert]"
        )
    return {name: tensors[name].float() for name in newborn}


def _same_expert(
    federation: Federation, graft: Graft | None, tensors: Mapping[str, Tensor]
) -> bool:
    """Whether a shared expert that was read computes what the recipe's does, from the same experts."""
    expert = federation.base.shared_expert
    if graft is None or expert is None:
        return graft is expert
    ours = expert.graft
    told = [
        (g.form, g.gate if not g.trains_gate else "", g.weights, g.scaling) for g in (graft, ours)
    ]
    indices = expert.indices(federation.base.sites)
    return told[0] == told[1] and all(torch.equal(tensors[n], indices[n]) for n in indices)


def _select(federation: Federation, name: str) -> list[list[int]]:
    """Choose from the client's own training rows and nothing else."""
    graft, examples = federation.settings.graft, federation.train[name]
    if graft is None:
        return []
    batches = [collate(examples[i : i + 8], federation.pad_id) for i in range(0, len(examples), 8)]
    seed = seed_of(federation.settings.seed, "selection", name)
    return choose_experts(federation.base.model, federation.base.sites, graft, batches, seed)
