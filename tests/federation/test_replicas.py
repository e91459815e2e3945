"""Cohorts side by side, beside the same cohorts one after another."""

from dataclasses import replace

import pytest
import torch
from families import double

from pomona.data.examples import Example
from pomona.errors import PomonaError
from pomona.federation.cohort import FrozenBase
from pomona.federation.graft import Graft
from pomona.federation.local import LocalTraining, train_cohort
from pomona.federation.replicas import replicas_of
from pomona.federation.shared_expert import SharedGraft
from pomona.federation.stage import Task
from pomona.federation.strategies import FedAvg
from pomona.federation.update import ClientState
from pomona.models.experts import enable_checkpointing, find_expert_sites, freeze
from pomona.models.lora import LoRA
from pomona.models.packing import can_pack

TRAINING = LocalTraining(steps=2, batch=2)
REST = (TRAINING, FedAvg(), 0, 1, 1, 0)


def trained(base, tasks):
    return train_cohort(base, tasks, *REST)


@pytest.fixture(autouse=True)
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def base_of(family="mixtral", checkpointing=False):
    model = double(family)
    freeze(model)
    if checkpointing:
        enable_checkpointing(model)
    sites = tuple(find_expert_sites(model))
    shared = SharedGraft(rank=2).on(model, sites)
    graft = Graft(rank=2, gate="zero")
    base = FrozenBase(model, LoRA(rank=2), graft, sites, LoRA(rank=2), shared)
    return replace(base, packs=can_pack(model, 12))


def tasks_of(base, clients):
    made = []
    for c in range(clients):
        generator = torch.Generator().manual_seed(c)
        rows = [
            Example(
                tuple(torch.randint(3, 60, (6 + (c + k) % 5,), generator=generator).tolist()), 3
            )
            for k in range(4)
        ]
        experts = [[c % site.num_experts] for site in base.sites]
        name = f"client {c}"
        state = ClientState(
            base.init_adapter(0),
            base.init_graft(0, name, experts),
            base.init_personal(0, name),
        )
        made.append(Task(name, state, rows))
    return made


def same(ours, theirs, close=False):
    for one, other in zip(ours, theirs, strict=True):
        for part in ("adapter", "graft", "personal"):
            for name, value in getattr(one.state, part).items():
                expected = getattr(other.state, part)[name]
                if close:
                    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6)
                else:
                    assert torch.equal(value, expected), name
        if not close:
            assert one.losses == other.losses


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "jamba"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_side_by_side_is_one_after_another_bit_for_bit(family, checkpointing):
    base = base_of(family, checkpointing)
    tasks = tasks_of(base, 7)
    found = replicas_of(base).map(trained, tasks)
    torch.set_num_threads(1)
    apart = [train_cohort(base, part, *REST) for part in (tasks[:2], tasks[2:4], tasks[4:])]
    same(found, [one for part in apart for one in part])
    same(found, train_cohort(base, tasks, *REST), close=True)


def test_every_client_of_a_cohort_trains_at_its_own_rate():
    """Factors of the learning rate, against each client alone at that rate."""
    base = base_of()
    tasks = tasks_of(base, 3)
    rates = {"client 1": 0.25, "client 2": 0.0}
    found = train_cohort(base, tasks, replace(TRAINING, rates=rates), *REST[1:])
    for task, own in zip(tasks, found, strict=True):
        factor = rates.get(task.client, 1.0)
        rate = TRAINING.learning_rate * factor
        alone = replace(TRAINING, learning_rate=rate, final_learning_rate=min(rate, 5e-5))
        same([own], train_cohort(base, [task], alone, *REST[1:]), close=True)
    still = found[2].state.adapter
    assert all(torch.equal(value, tasks[2].state.adapter[name]) for name, value in still.items())


@pytest.mark.parametrize("clients", [1, 2, 3])
def test_clients_fewer_than_threads(clients):
    base = base_of()
    tasks = tasks_of(base, clients)
    found = replicas_of(base).map(trained, tasks)
    assert torch.get_num_threads() == 3
    torch.set_num_threads(3 // clients)
    same(found, [one for task in tasks for one in train_cohort(base, [task], *REST)])


def test_replicas_share_every_tensor_and_no_module():
    base = base_of()
    replicas = replicas_of(base)
    assert len(replicas.bases) == 3
    assert replicas.bases[0] is base
    for other in replicas.bases[1:]:
        assert not set(map(id, base.model.modules())) & set(map(id, other.model.modules()))
        pairs = zip(base.model.parameters(), other.model.parameters(), strict=True)
        assert all(ours is theirs for ours, theirs in pairs)
        assert {site.experts for site in other.sites} <= set(other.model.modules())
    for replica in replicas.bases:
        assert not any(m._forward_hooks for m in replica.model.modules())


def test_another_device_has_weights_of_its_own_and_gives_the_same():
    base = base_of()
    replicas = replicas_of(base, [torch.device("cpu")])
    assert len(replicas.bases) == 2
    other = replicas.bases[1]
    pairs = list(zip(base.model.parameters(), other.model.parameters(), strict=True))
    assert all(torch.equal(a, b) and a.data_ptr() != b.data_ptr() for a, b in pairs)
    assert {site.experts for site in other.sites} <= set(other.model.modules())
    tasks = tasks_of(base, 5)
    found = replicas.map(trained, tasks)
    torch.set_num_threads(1)
    same(found, [one for part in (tasks[:2], tasks[2:]) for one in train_cohort(base, part, *REST)])


def test_who_diverges_is_named_and_threads_are_given_back():
    base = base_of()
    tasks = tasks_of(base, 4)
    poisoned = {n: torch.full_like(v, float("inf")) for n, v in tasks[3].state.personal.items()}
    tasks[3] = replace(tasks[3], state=replace(tasks[3].state, personal=poisoned))
    with pytest.raises(PomonaError, match='"client 3" diverged in round 1'):
        replicas_of(base).map(trained, tasks)
    assert torch.get_num_threads() == 3
