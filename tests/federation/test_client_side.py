"""What strategies do at the clients: corrections, frozen and private factors, merged residuals."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from laws.test_federation_laws import base_of, examples, grown, newborn

from pomona.data.examples import collate
from pomona.errors import PomonaError
from pomona.federation.local import LocalTraining, train_cohort
from pomona.federation.stage import Task
from pomona.federation.strategies import (
    FedAvg,
    FedProx,
    FedSALoRA,
    FFALoRA,
    FLoRA,
    Scaffold,
    SharedFixed,
)
from pomona.federation.update import Update, join, split
from pomona.models.lora import LoRA, attach_lora
from pomona.models.peft_format import without_residuals
from pomona.training.loss import completion_losses

ONE_STEP = LocalTraining(steps=1, batch=5, learning_rate=1e-2)


def gradient_of(base, state, rows):
    """The plain gradient of one client's loss on all its rows, by autograd alone."""
    leaves = {n: v.clone().requires_grad_() for n, v in state.adapter.items()}
    batch = collate(rows, 0)
    with base.attach_one(replace(state, adapter=leaves)):
        loss = completion_losses(
            base.model, batch.input_ids_BT, batch.attention_mask_BT, batch.label_mask_BT, 1
        )
        loss.sum().backward()
    return {n: v.grad for n, v in leaves.items()}


def test_scaffold_remembers_the_clients_own_mean_gradient():
    base, strategy = base_of("mixtral"), Scaffold()
    states = [grown(newborn(base, f"c{c}"), c) for c in range(2)]
    born = strategy.birth(states[0].adapter)
    own = {n: torch.full_like(v, 0.25) for n, v in born.items()}
    server = {n: torch.full_like(v, -0.5) for n, v in born.items()}
    tasks = [
        Task(f"c{c}", replace(state, memory=own), examples(c), server)
        for c, state in enumerate(states)
    ]
    trained = train_cohort(base, tasks, ONE_STEP, strategy, 0, 1, 1, 0)
    for task, after in zip(tasks, trained, strict=True):
        for name, gradient in gradient_of(base, task.state, task.examples).items():
            control = after.state.memory[f"control.{name}"]
            torch.testing.assert_close(control, gradient, rtol=1e-4, atol=1e-6)
            change = after.report[f"control.{name}"]
            torch.testing.assert_close(change, control - 0.25)


def test_scaffold_steps_along_the_corrected_gradient():
    """A correction that outweighs the gradient decides AdamW's first step, which is its sign."""
    base, strategy = base_of("mixtral"), Scaffold()
    state = grown(newborn(base, "c"), 1)
    born = strategy.birth(state.adapter)
    server = {n: torch.full_like(v, 1e3) for n, v in born.items()}
    task = Task("c", replace(state, memory=born), examples(0), server)
    (after,) = train_cohort(base, [task], ONE_STEP, strategy, 0, 1, 1, 0)
    for name, value in after.state.adapter.items():
        torch.testing.assert_close(value, state.adapter[name] - 1e-2, rtol=1e-4, atol=1e-5)
    (plain,) = train_cohort(base, [replace(task, server={})], ONE_STEP, FedAvg(), 0, 1, 1, 0)
    assert after.losses == pytest.approx(plain.losses), "the loss that is told is the rows' own"


def test_scaffolds_server_is_numpys():
    """c ← c + (|S| / N) · mean of the changes; the adapter is the mean by rows."""
    rng, strategy = np.random.default_rng(0), Scaffold(fraction=0.5)
    state = strategy.init({"w": torch.zeros(2, 3)})
    sent = [(rows, rng.normal(size=(2, 3)), rng.normal(size=(2, 3))) for rows in (3, 5)]
    updates = [
        Update("c", rows, {"w": torch.tensor(w), "control.w": torch.tensor(c)})
        for rows, w, c in sent
    ]
    after = strategy.aggregate(state, updates)
    mean = sum(rows * w for rows, w, _ in sent) / 8
    np.testing.assert_allclose(after.shared["w"].numpy(), mean, rtol=1e-6)
    moved = 0.5 * np.mean([c for _, _, c in sent], axis=0)
    np.testing.assert_allclose(after.memory["control.w"].numpy(), moved, rtol=1e-5)


def test_ffa_trains_and_sends_b_alone():
    base, strategy = base_of("mixtral"), FFALoRA()
    state = newborn(base, "c")
    task = Task("c", state, examples(0))
    (after,) = train_cohort(base, [task], ONE_STEP, strategy, 0, 1, 1, 0)
    sent, private = split(after.state, strategy.shares, strategy.freezes)
    assert sent and all(name.endswith("lora_B") for name in sent)
    assert not private.adapter
    for name, value in after.state.adapter.items():
        assert torch.equal(value, state.adapter[name]) == name.endswith("lora_A")
    server = strategy.aggregate(strategy.init(state.adapter), [Update("c", 1, sent)])
    assert all(torch.equal(v, after.state.adapter[n]) for n, v in server.shared.items())


def test_ffas_server_is_numpys():
    """The mean of B by rows beside the A that everybody was born with."""
    rng, strategy = np.random.default_rng(0), FFALoRA()
    born = {"q.lora_A": torch.ones(2, 4), "q.lora_B": torch.zeros(3, 2)}
    sent = [(rows, rng.normal(size=(3, 2))) for rows in (3, 5)]
    updates = [Update("c", rows, {"q.lora_B": torch.tensor(b)}) for rows, b in sent]
    after = strategy.aggregate(strategy.init(born), updates).shared
    assert torch.equal(after["q.lora_A"], born["q.lora_A"])
    mean = sum(rows * b for rows, b in sent) / 8
    np.testing.assert_allclose(after["q.lora_B"].numpy(), mean, rtol=1e-6)


def test_fedproxs_penalty_is_numpys():
    """μ / 2 · ‖θ − θ₀‖², over all tensors of a client together."""
    rng = np.random.default_rng(0)
    now, sent = ([rng.normal(size=(2, *s)) for s in ((3, 4), (5,))] for _ in range(2))
    named = [{f"t{i}": torch.tensor(v) for i, v in enumerate(own)} for own in (now, sent)]
    found = FedProx(0.3).penalty(*named)
    distance = [
        sum(((a[c] - b[c]) ** 2).sum() for a, b in zip(now, sent, strict=True)) for c in range(2)
    ]
    np.testing.assert_allclose(found.numpy(), 0.15 * np.array(distance), rtol=1e-12)


def test_fedsa_keeps_every_clients_own_b():
    base, strategy = base_of("mixtral"), FedSALoRA()
    tasks = [Task(f"c{c}", newborn(base, f"c{c}"), examples(c)) for c in range(2)]
    trained = train_cohort(base, tasks, ONE_STEP, strategy, 0, 1, 1, 0)
    parts = [split(t.state, strategy.shares) for t in trained]
    for sent, private in parts:
        assert all(name.endswith("lora_A") for name in sent)
        assert all(name.endswith("lora_B") for name in private.adapter)
    updates = [Update(f"c{c}", c + 1, sent) for c, (sent, _) in enumerate(parts)]
    server = strategy.aggregate(strategy.init({}), updates)
    for name, value in server.shared.items():
        mean = (parts[0][0][name].numpy() + 2 * parts[1][0][name].numpy()) / 3
        np.testing.assert_allclose(value.numpy(), mean, rtol=1e-5, atol=1e-8)
    for (_, private), t in zip(parts, trained, strict=True):
        again = join(server.shared, private)
        assert again.adapter.keys() == t.state.adapter.keys()


def products(shared):
    names = {n.rpartition(".")[0] for n in shared if n.endswith("lora_A")}
    return {n: shared[f"{n}.lora_B"].numpy() @ shared[f"{n}.lora_A"].numpy() for n in names}


def test_floras_residual_is_the_exact_mean_of_products_of_any_rank():
    """ΔW ← ΔW + Σ rows · B · A / Σ rows, and the new pair adds nothing."""
    generator = torch.Generator().manual_seed(0)

    def pair(rank):
        return {
            "q.lora_A": torch.randn(rank, 6, generator=generator),
            "q.lora_B": torch.randn(5, rank, generator=generator),
        }

    newborn_pair = {**pair(3), "q.lora_B": torch.zeros(5, 3)}
    state = FLoRA().init(newborn_pair)
    assert torch.equal(state.shared["q.lora_A"], newborn_pair["q.lora_A"])
    expected = np.zeros((5, 6))
    for round_ in range(2):
        sent = [(rows, pair(rank)) for rows, rank in ((2, 1), (3, 3), (4, 2))]
        before = state.shared["q.lora_A"]
        state = FLoRA().aggregate(state, [Update("c", rows, own) for rows, own in sent])
        expected = expected + sum(rows * products(own)["q"] for rows, own in sent) / 9
        np.testing.assert_allclose(
            state.shared["q.residual"].numpy(), expected, rtol=1e-5, atol=1e-5
        )
        assert not state.shared["q.lora_B"].any(), round_
        assert not torch.equal(state.shared["q.lora_A"], before)


def test_a_residual_is_trained_by_nobody_and_leaves_as_plain_lora():
    base = base_of("mixtral")
    state = newborn(base, "c")
    server = FLoRA().init(state.adapter)
    moved = {
        n: torch.randn(v.shape, generator=torch.Generator().manual_seed(1))
        if "residual" in n
        else v
        for n, v in server.shared.items()
    }
    task = Task("c", replace(state, adapter=moved), examples(0))
    (after,) = train_cohort(base, [task], ONE_STEP, FLoRA(), 0, 1, 1, 0)
    sent, _ = split(after.state, "adapter")
    assert not any(name.endswith("residual") for name in sent)
    assert all(torch.equal(after.state.adapter[n], v) for n, v in moved.items() if "residual" in n)
    lora, plain = without_residuals(base.lora, after.state.adapter)
    tokens = torch.tensor([[3, 4, 5, 6, 7]])

    def logits(how, tensors):
        with attach_lora(base.model, how, {n: v.unsqueeze(0) for n, v in tensors.items()}):
            return base.model(tokens).logits

    assert lora.rank == 32
    torch.testing.assert_close(
        logits(lora, plain), logits(base.lora, after.state.adapter), rtol=1e-4, atol=1e-4
    )


def test_flora_refuses_experts():
    with pytest.raises(PomonaError, match=r"FLoRA keeps m\.experts\.down_proj whole"):
        FLoRA().init({"m.experts.down_proj.lora_A": torch.zeros(4, 2, 6)})


def test_after_the_last_round_only_what_is_private_learns():
    base = base_of("mixtral")
    state = newborn(base, "c")
    strategy = SharedFixed("adapter")
    (after,) = train_cohort(base, [Task("c", state, examples(0))], ONE_STEP, strategy, 0, 1, 1, 0)
    sent, private = split(after.state, strategy.shares, strategy.freezes)
    assert not sent and not private.adapter
    assert all(torch.equal(v, state.adapter[n]) for n, v in after.state.adapter.items())
    assert any(not torch.equal(v, state.graft[n]) for n, v in private.graft.items())


@pytest.mark.parametrize("kind", ["personal", "experts", "layers"])
def test_a_cohort_with_every_kind_of_lora_is_its_clients_one_by_one(kind):
    base = base_of("mixtral")
    if kind == "personal":
        base = replace(base, personal=LoRA(3, 6.0, ("q_proj", "o_proj")))
    else:
        lora = LoRA(2, 4.0, layers=(1,)) if kind == "layers" else LoRA(2, 4.0, experts=True)
        base = replace(base, lora=lora)
    tasks = []
    for c in range(3):
        state = newborn(base, f"c{c}", c % 2)
        own = base.init_personal(0, f"c{c}")
        tasks.append(Task(f"c{c}", replace(grown(state, c), personal=own), examples(c)))
    training = LocalTraining(steps=2, batch=2, learning_rate=1e-3)
    together = train_cohort(base, tasks, training, FedAvg(), 0, 1, 2, 0)
    for c, task in enumerate(tasks):
        (alone,) = train_cohort(base, [task], training, FedAvg(), 0, 1, 2, 0)
        assert together[c].losses == pytest.approx(alone.losses, rel=1e-5)
        for part in ("adapter", "graft", "personal"):
            ours, theirs = getattr(together[c].state, part), getattr(alone.state, part)
            assert ours.keys() == theirs.keys()
            for name in ours:
                torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=2e-5)


def test_clients_with_fewer_steps_leave_the_cohort_and_all_keep_their_optimiser():
    """Epochs over different numbers of rows, two rounds, moments kept: as each client alone."""
    base = base_of("mixtral")
    training = LocalTraining(epochs=1, batch=2, learning_rate=1e-2, keep_optimiser=True)
    rows = (3, 8, 5, 3)
    tasks = [Task(f"c{c}", newborn(base, f"c{c}"), examples(c, n)) for c, n in enumerate(rows)]

    def rounds(group, ones):
        for round_ in (1, 2):
            present = [t for t in group if round_ == 2 or t.client in ones]
            trained = train_cohort(base, present, training, FedAvg(), 0, round_, 2, 0)
            by_name = {t.client: done for t, done in zip(present, trained, strict=True)}
            group = [
                replace(t, state=by_name[t.client].state) if t.client in by_name else t
                for t in group
            ]
        return {t.client: by_name[t.client] for t in group}

    together = rounds(tasks, {"c0", "c1", "c3"})
    assert [len(own.losses) for own in together.values()] == [2, 4, 3, 2]
    assert [int(own.state.memory["optimiser.step"]) for own in together.values()] == [4, 8, 3, 4]
    for task in tasks:
        alone = (
            rounds([task], {"c0", "c1", "c3"} & {task.client})[task.client]
            if (task.client != "c2")
            else train_cohort(base, [task], training, FedAvg(), 0, 2, 2, 0)[0]
        )
        ours = together[task.client]
        assert ours.losses == pytest.approx(alone.losses, rel=1e-5)
        for name, value in alone.state.graft.items():
            torch.testing.assert_close(ours.state.graft[name], value, rtol=1e-5, atol=2e-5)
