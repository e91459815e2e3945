"""Packed rows of a cohort beside their padded twin: the same losses and the same gradients."""

from dataclasses import replace

import pytest
import torch
from laws.test_federation_laws import base_of, examples, grown, newborn

from pomona.data.examples import Example
from pomona.federation.dp_sgd import DPSGD
from pomona.federation.graft import Graft
from pomona.federation.local import LocalTraining, train_cohort
from pomona.federation.objective import client_losses
from pomona.federation.rehearsal import Rehearsal
from pomona.federation.shared_expert import SharedGraft
from pomona.federation.stage import Task
from pomona.federation.strategies import FedAvg
from pomona.federation.update import ClientState, stack
from pomona.models.experts import enable_checkpointing
from pomona.models.lora import LoRA
from pomona.models.packing import can_pack
from pomona.training.loop import AdamW

GRAFTS = {
    "LoRA": Graft(rank=3, bias=True),
    "no gate, two": Graft(rank=2, gate="none", count=2),
    "resident": Graft(rank=2, gate="resident", form="copy"),
    "full": Graft(weights="full"),
}
FEW = [examples(0, 3), examples(1, 1), examples(2, 2)]


def everything(family: str, graft: Graft, experts: bool = False):
    """A base with all that can hang on it, and three clients' states that training has moved."""
    base = base_of(family, graft)
    shared = SharedGraft(expert=1, rank=2).on(base.model, base.sites)
    base = replace(
        base,
        lora=replace(base.lora, experts=experts),
        personal=LoRA(3, 2.0, base.lora.targets),
        shared_expert=shared,
        rehearsed=Rehearsal(rows=2, texts=6, length=7, top=8).begin(base.model, 1, 0),
    )
    states = []
    for c in range(3):
        born = grown(newborn(base, f"c{c}", c % 2), c)
        personal = grown(ClientState(base.init_personal(0, f"c{c}")), c).adapter
        states.append(replace(born, personal=personal))
    return base, states


def leaves(state: ClientState) -> ClientState:
    def one(tensors):
        return {
            n: v.clone().requires_grad_() if v.is_floating_point() else v
            for n, v in tensors.items()
        }

    return ClientState(one(state.adapter), one(state.graft), one(state.personal))


def losses_and_gradients(base, states, rows, clients, router_loss=0.0, texts=()):
    stacked = leaves(stack(states))
    with base.attach(stacked):
        loss_C = client_losses(base, rows, clients, 0, router_loss, texts)
        loss_C.sum().backward()
    parts = {
        **stacked.adapter,
        **stacked.graft,
        **{f"p.{n}": v for n, v in stacked.personal.items()},
    }
    return loss_C.detach(), {n: v.grad for n, v in parts.items() if v.grad is not None}


@pytest.mark.parametrize(
    ("family", "graft", "experts"),
    [
        *(("mixtral", kind, experts) for kind in GRAFTS for experts in (False, True)),
        ("qwen2_moe", "LoRA", False),
        ("deepseek_v3", "LoRA", True),
    ],
)
def test_packed_is_padded(family, graft, experts):
    base, states = everything(family, GRAFTS[graft], experts)
    factor = 0.5 if hasattr(base.model, "router_aux_loss_coef") else 0.0
    texts = [[0, 3], [5, 1], [2, 2]]
    expected, theirs = losses_and_gradients(base, states, FEW, 3, factor, texts)
    assert can_pack(base.model, 16)
    found, ours = losses_and_gradients(replace(base, packs=True), states, FEW, 3, factor, texts)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert ours.keys() == theirs.keys()
    assert len(ours) > 20
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=2e-3, atol=2e-5, msg=name)


def test_rows_that_are_clients_of_their_own():
    """As DP-SGD has them: a client with fewer rows has some without tokens, whose loss is zero."""
    base, states = everything("mixtral", GRAFTS["LoRA"])
    apart = [state for state in states for _ in range(3)]
    expected, theirs = losses_and_gradients(base, apart, FEW, 9)
    assert can_pack(base.model, 16)
    found, ours = losses_and_gradients(replace(base, packs=True), apart, FEW, 9)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert found[[4, 5, 8]].eq(0).all()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=2e-3, atol=2e-5, msg=name)
        assert gradient[4].eq(0).all()


@pytest.mark.parametrize("packs", [False, True])
def test_noise_rehearsal_and_checkpointing_go_together(packs):
    """What a layer computes again in the backward pass has to meet the hooks it met before."""
    made = []
    for checkpointing in (False, True):
        base, states = everything("mixtral", GRAFTS["LoRA"])
        if checkpointing:
            enable_checkpointing(base.model)
        assert can_pack(base.model, 16)
        training = LocalTraining(
            steps=2, batch=2, learning_rate=1e-3, dp_sgd=DPSGD(clip=0.5, noise=0.5)
        )
        tasks = [Task(f"c{c}", s, FEW[c]) for c, s in enumerate(states)]
        made.append(train_cohort(replace(base, packs=packs), tasks, training, FedAvg(), 0, 1, 1, 0))
    for plain, again in zip(*made, strict=True):
        assert plain.losses == pytest.approx(again.losses, rel=1e-5)
        for name, value in plain.state.graft.items():
            torch.testing.assert_close(again.state.graft[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("packs", [False, True])
def test_checkpointing_changes_nothing(packs):
    base, states = everything("mixtral", GRAFTS["LoRA"])
    base = replace(base, packs=packs)
    assert can_pack(base.model, 16)
    texts = [[0, 3], [5, 1], [2, 2]]
    expected, theirs = losses_and_gradients(base, states, FEW, 3, 0.5, texts)
    enable_checkpointing(base.model)
    found, ours = losses_and_gradients(base, states, FEW, 3, 0.5, texts)
    torch.testing.assert_close(found, expected)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_row_without_a_prompt_has_no_label_on_its_first_token():
    base, states = everything("mixtral", GRAFTS["LoRA"])
    rows = [[Example((5, 6, 7), 0)], [Example((8, 9, 10, 11), 2)], [Example((3, 4), 1)]]
    later = [[Example((5, 6, 7), 1)], *rows[1:]]
    expected, _ = losses_and_gradients(base, states, later, 3)
    assert can_pack(base.model, 16)
    for packs in (False, True):
        found, _ = losses_and_gradients(replace(base, packs=packs), states, rows, 3)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("private", [None, DPSGD(clip=0.5, noise=0.5)], ids=["", "DP-SGD"])
def test_a_packed_cohort_trains_as_a_padded_one(private):
    """Rounds of steps with clipping and AdamW, clients with fewer rows than a batch, and alone as together."""
    base, states = everything("mixtral", GRAFTS["LoRA"])
    training = LocalTraining(
        steps=3, batch=2, learning_rate=1e-3, dp_sgd=private, optimiser=AdamW(epsilon=1e-4)
    )
    tasks = [Task(f"c{c}", s, FEW[c]) for c, s in enumerate(states)]
    assert can_pack(base.model, 16)

    def trained(packs: bool, which):
        return train_cohort(replace(base, packs=packs), which, training, FedAvg(), 0, 1, 1, 0)

    padded, packed = trained(False, tasks), trained(True, tasks)
    alone = [trained(True, [task])[0] for task in tasks]
    for one, other, own in zip(padded, packed, alone, strict=True):
        assert one.losses == pytest.approx(other.losses, rel=1e-4)
        assert own.losses == pytest.approx(other.losses, rel=1e-4)
        for part in ("adapter", "graft", "personal"):
            for name, value in getattr(other.state, part).items():
                for twin in (one, own):
                    torch.testing.assert_close(
                        value, getattr(twin.state, part)[name], rtol=1e-3, atol=2e-5, msg=name
                    )
