"""Clients measured together in packed passes, beside each of them alone with its rows padded."""

from dataclasses import replace

import pytest
import torch
from families import double

from pomona.data.examples import Example
from pomona.federation.cohort import FrozenBase
from pomona.federation.forgetting import forgetting_lines
from pomona.federation.graft import Graft
from pomona.federation.measure import Models, losses_of, measured_of
from pomona.federation.update import ClientState, stack
from pomona.models.experts import find_expert_sites, freeze
from pomona.models.lora import LoRA
from pomona.models.packing import can_pack

ROWS = (5, 1, 3)
GRAFTS = {
    "router": Graft(rank=2, bias=True),
    "two": Graft(rank=2, count=2, gate="zero"),
    "resident": Graft(rank=2, gate="resident"),
    "no gate": Graft(rank=2, gate="none"),
}


def base_of(family, graft):
    model = double(family)
    freeze(model)
    sites = tuple(find_expert_sites(model))
    base = FrozenBase(model, LoRA(rank=2), graft, sites, LoRA(rank=2))
    return replace(base, packs=can_pack(model, 12))


def states_of(base, clients):
    """Return clients whose every tensor has moved; each remembers something else."""
    states = []
    for c in range(clients):
        generator = torch.Generator().manual_seed(c)
        experts = [
            [(c + k) % site.num_experts for k in range(base.graft.count)] for site in base.sites
        ]
        state = ClientState(
            base.init_adapter(0),
            base.init_graft(0, f"client {c}", experts),
            base.init_personal(0, f"client {c}"),
        )
        parts = [
            {
                name: value + 0.1 * torch.randn(value.shape, generator=generator)
                if value.is_floating_point()
                else value
                for name, value in part.items()
            }
            for part in (state.adapter, state.graft, state.personal)
        ]
        states.append(ClientState(*parts, memory={str(c): torch.zeros(1)}))
    return states


def rows_of():
    generator = torch.Generator().manual_seed(7)
    return [
        [
            Example(tuple(torch.randint(3, 60, (4 + 3 * k,), generator=generator).tolist()), k)
            for k in range(count)
        ]
        for count in ROWS
    ]


def alike(together, alone):
    assert len(together) == len(alone) == len(ROWS)
    for ours, theirs in zip(together, alone, strict=True):
        assert [loss.tokens for loss in ours.losses] == [loss.tokens for loss in theirs.losses]
        nats = [loss.nats for loss in theirs.losses]
        assert [loss.nats for loss in ours.losses] == pytest.approx(nats, rel=1e-6)
        assert torch.equal(ours.counts_LE, theirs.counts_LE)
        assert ours.openness == pytest.approx(theirs.openness, rel=1e-6)
        assert ours.tokens == theirs.tokens


@pytest.mark.parametrize("graft", GRAFTS.values(), ids=GRAFTS)
@pytest.mark.parametrize("batch", [1, 4, 32])
def test_a_cohort_is_measured_as_its_clients_alone(graft, batch):
    base = base_of("mixtral", graft)
    assert base.packs
    states, rows = states_of(base, len(ROWS)), rows_of()
    together = measured_of(base, states, rows, 0, batch)
    alike(together, measured_of(replace(base, packs=False), states, rows, 0, batch))
    alone = [
        measured_of(base, [s], [own], 0, batch)[0] for s, own in zip(states, rows, strict=True)
    ]
    alike(together, alone)
    assert [m.losses for m in together] == losses_of(base, states, rows, 0, batch)
    assert all(len(found.openness) == len(base.sites) for found in together)
    assert len({tuple(found.openness) for found in together}) == (1 if graft.gate == "none" else 3)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "jamba"])
def test_one_model_for_all_clients(family):
    """A single state, with a graft or without, serves everybody's rows, each client counted by itself."""
    base = base_of(family, Graft(rank=2))
    assert base.packs == (family == "qwen3_moe")
    rows = rows_of()
    for state in (ClientState(), states_of(base, 1)[0]):
        together = measured_of(base, [state], rows, 0, 4)
        alike(together, measured_of(replace(base, packs=False), [state] * 3, rows, 0, 4))
        assert all(bool(found.openness) == bool(state.graft) for found in together)


def test_forgetting_of_a_cohort_is_that_of_each():
    base = base_of("mixtral", Graft(rank=2))
    states, generator = states_of(base, 3), torch.Generator().manual_seed(1)
    windows = {
        name: torch.randint(3, 60, (count, 9), generator=generator)
        for name, count in (("a", 2), ("b", 3))
    }
    names = ["x", "y", "z"]
    together = forgetting_lines(base, Models("personal", names, states), windows, 0, 4)
    assert [[line["client"] for line in own] for own in together] == [[n] * 5 for n in names]
    for state, own in zip(states, together, strict=True):
        with base.attach(stack([state])), torch.no_grad():
            logits = base.model(input_ids=torch.cat(list(windows.values())), use_cache=False).logits
        ids = torch.cat(list(windows.values()))[:, 1:]
        nats = -logits[:, :-1].log_softmax(-1).gather(2, ids.unsqueeze(2)).sum((1, 2))
        assert [line["nats"] for line in own] == pytest.approx(nats.tolist(), rel=1e-6)
        assert [(line["domain"], line["window"]) for line in own] == [
            *(("a", k) for k in range(2)),
            *(("b", k) for k in range(3)),
        ]
        assert {line["tokens"] for line in own} == {8}
    (nobody,) = forgetting_lines(base, Models("base", (), [ClientState()]), windows, 0, 4)
    assert {line["client"] for line in nobody} == {None}
    pooled = forgetting_lines(base, Models("personal", names, states[:1]), windows, 0, 4)
    nats = together[0][0]["nats"]
    assert [own[0]["nats"] for own in pooled] == pytest.approx([nats] * 3, rel=1e-6)
