"""Laws of the federation: what must hold whatever the model and the data."""

import itertools

import pytest
import torch
from families import FAMILIES, double
from hypothesis import given, settings
from hypothesis import strategies as st

from pomona.data.examples import Example
from pomona.federation.cohort import FrozenBase
from pomona.federation.graft import Graft
from pomona.federation.local import LocalTraining, Task, train_cohort
from pomona.federation.strategies import STRATEGIES, FedAvg, FedProx, LocalOnly
from pomona.federation.update import ClientState, Update, join, split, stack, unstack
from pomona.models.experts import find_expert_sites, freeze
from pomona.models.lora import LoRA, find_projections
from pomona.training.loop import AdamW

TOKENS = torch.randint(3, 60, (4, 12), generator=torch.Generator().manual_seed(7))
GRAFT = Graft(rank=2)
# Compressed attention and hybrid layers have no q_proj everywhere; name what each family has.
TARGETS = {
    "deepseek_v2": ("q_a_proj", "kv_a_proj_with_mqa"),
    "deepseek_v3": ("q_a_proj", "kv_a_proj_with_mqa"),
}


def base_of(family: str, graft: Graft = GRAFT) -> FrozenBase:
    model = FAMILIES[family]()
    freeze(model)
    lora = LoRA(2, 4.0, TARGETS.get(family, ("q_proj", "k_proj", "v_proj")))
    return FrozenBase(model, lora, graft, tuple(find_expert_sites(model)))


def newborn(base: FrozenBase, client: str, experts: int = 0) -> ClientState:
    count = base.graft.count if base.graft else 1
    chosen = [
        [(experts + i + 2 * g) % site.num_experts for g in range(count)]
        for i, site in enumerate(base.sites)
    ]
    return ClientState(base.init_adapter(0), base.init_graft(0, client, chosen))


def grown(state: ClientState, seed: int) -> ClientState:
    """A state that training has moved: every factor is random."""
    generator = torch.Generator().manual_seed(seed)

    def move(tensors):
        return {
            name: value + 0.2 * torch.randn(value.shape, generator=generator)
            if value.is_floating_point()
            else value
            for name, value in tensors.items()
        }

    return ClientState(move(state.adapter), move(state.graft))


def logits(base: FrozenBase, state: ClientState, tokens=TOKENS) -> torch.Tensor:
    with base.attach(state), torch.no_grad():
        return base.model(input_ids=tokens, use_cache=False).logits


def examples(client: int, rows: int = 5) -> list[Example]:
    generator = torch.Generator().manual_seed(client)
    lengths = torch.randint(6, 14, (rows,), generator=generator).tolist()
    return [
        Example(tuple(torch.randint(3, 60, (n,), generator=generator).tolist()), 3) for n in lengths
    ]


def test_every_family_is_covered():
    assert len(FAMILIES) >= 14


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("gate", ["router", "zero"])
def test_silent_birth_equals_the_base_bit_for_bit(family, gate):
    base = base_of(family, Graft(rank=2, gate=gate, bias=True))
    cohort = stack([newborn(base, "a", 1), newborn(base, "b", 2)])
    plain = logits(base, ClientState())
    assert torch.equal(logits(base, cohort), plain)
    assert not torch.equal(logits(base, grown(cohort, 1)), plain)


# Every way to hang a graft on a layer whose birth promises to be silent, beside the gate's two starts.
DELTAS = {
    "three per layer": Graft(rank=2, count=3),
    "no gate": Graft(rank=2, gate="none"),
    "resident": Graft(rank=2, gate="resident"),
    "full": Graft(weights="full", bias=True),
    "full, resident, two": Graft(weights="full", gate="resident", count=2),
    "full, no gate, two": Graft(weights="full", gate="none", count=2),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("graft", DELTAS.values(), ids=DELTAS)
def test_silent_birth_of_every_kind_of_graft(family, graft):
    base = base_of(family, graft)
    cohort = stack([newborn(base, "a", 1), newborn(base, "b", 2)])
    plain = logits(base, ClientState())
    assert torch.equal(logits(base, cohort), plain)
    assert torch.equal(logits(base, stack([newborn(base, "a", 1)])), plain)
    moved = ClientState(graft=grown(cohort, 1).graft)
    assert not torch.equal(logits(base, moved), plain)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("graft", [GRAFT, *DELTAS.values()], ids=["one", *DELTAS])
def test_silent_birth_on_a_bfloat16_base(family, graft):
    base = base_of(family, graft)
    base.model.bfloat16()
    plain = logits(base, ClientState())
    assert plain.dtype == torch.bfloat16
    assert torch.equal(logits(base, stack([newborn(base, "a", 1), newborn(base, "b")])), plain)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("weights", ["lora", "full"])
def test_a_resident_gate_is_training_the_expert_itself(family, weights):
    """The delta form under the router's own weight equals W + ΔW written into the model, in float64."""
    model = double(family)
    freeze(model)
    graft = Graft(rank=2, gate="resident", weights=weights, count=2)
    base = FrozenBase(model, LoRA(2, 4.0), graft, tuple(find_expert_sites(model)))
    chosen = [[1, 3] for _ in base.sites]
    state = grown(ClientState(graft=base.init_graft(0, "a", chosen)), 3)
    own = {n: v.double() if v.is_floating_point() else v for n, v in state.graft.items()}
    plain = logits(base, ClientState())
    grafted = logits(base, stack([ClientState(graft=own)]))
    for site in base.sites:
        for place, expert in enumerate([1, 3]):
            dense = site.expert(expert)  # views of the fused weights
            for part in ("gate", "up", "down"):
                name = f"{site.name}.{place}.{part}"
                if weights == "lora":
                    change = graft.scaling * own[f"{name}.lora_B"] @ own[f"{name}.lora_A"]
                else:
                    change = own[f"{name}.delta"]
                getattr(dense, part).add_(change)
                if f"{name}.delta_bias" in own:
                    getattr(dense, f"{part}_bias").add_(own[f"{name}.delta_bias"])
    merged = logits(base, ClientState())
    assert not torch.allclose(grafted, plain, rtol=1e-3)
    torch.testing.assert_close(grafted, merged, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_base_keeps_its_names_and_comes_back(family):
    base = base_of(family)
    before = list(base.model.state_dict())
    plain = logits(base, ClientState())
    with base.attach_one(grown(newborn(base, "a"), 1)):
        assert list(base.model.state_dict()) == before
    assert torch.equal(logits(base, ClientState()), plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cohort_equals_its_clients_one_by_one(family):
    check_cohort(base_of(family), AdamW())


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2", "gpt_oss", "lfm2_moe"])
@pytest.mark.parametrize(
    "graft",
    [
        *DELTAS.values(),
        Graft(rank=2, form="copy", gate="zero", bias=True),
        Graft(form="copy", weights="full", count=2),
    ],
    ids=[*DELTAS, "copy with a bias", "two full copies"],
)
def test_a_cohort_of_every_kind_of_graft(family, graft):
    """AdamW's first steps are the sign of a gradient, even of one that is zero but for rounding.

    Among all the weights of an expert there are such; a larger epsilon lets them rest.
    """
    check_cohort(base_of(family, graft), AdamW(epsilon=1e-5))


def check_cohort(base: FrozenBase, optimiser: AdamW) -> None:
    tasks = [
        Task(f"client {c}", grown(newborn(base, f"client {c}", c % 2), c), examples(c))
        for c in range(3)
    ]
    training = LocalTraining(steps=2, batch=2, learning_rate=1e-3, optimiser=optimiser)

    def trained(group):
        return train_cohort(base, group, training, FedProx(0.1), 0, 1, 2, 0)

    for together, task in zip(trained(tasks), tasks, strict=True):
        (alone,) = trained([task])
        assert together.losses == pytest.approx(alone.losses, rel=1e-5, abs=1e-6)
        for part, other in (
            (together.state.adapter, alone.state.adapter),
            (together.state.graft, alone.state.graft),
        ):
            assert part.keys() == other.keys()
            start = {**task.state.adapter, **task.state.graft}
            for name, value in part.items():
                torch.testing.assert_close(value, other[name], rtol=1e-5, atol=2e-5)
                if value.is_floating_point() and value.numel() > 8:
                    assert not torch.equal(value, start[name]), f"{name} was not trained"


def test_fedprox_without_mu_is_fedavg_bit_for_bit():
    base = base_of("mixtral")
    tasks = [Task(f"c{c}", newborn(base, f"c{c}"), examples(c)) for c in range(2)]
    training = LocalTraining(steps=3, batch=2, learning_rate=1e-2)
    runs = [
        train_cohort(base, tasks, training, strategy, 0, 1, 2, 0)
        for strategy in (FedAvg(), FedProx(0.0), FedProx(1.0))
    ]
    first = [own[0].state for own in runs]
    plain, zero, held = ([*s.adapter.values(), *s.graft.values()] for s in first)
    assert all(torch.equal(a, b) for a, b in zip(plain, zero, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(plain, held, strict=True))


@given(
    rows=st.lists(st.integers(1, 500), min_size=2, max_size=4),
    order=st.integers(0, 23),
    seed=st.integers(0, 100),
)
@settings(max_examples=30, deadline=None)
def test_client_order_is_irrelevant_and_the_mean_is_numpys(rows, order, seed):
    generator = torch.Generator().manual_seed(seed)
    updates = [
        Update(f"c{i}", n, {"w": torch.randn(3, 5, generator=generator)})
        for i, n in enumerate(rows)
    ]
    orders = list(itertools.permutations(updates))
    start = FedAvg().init({"w": torch.zeros(3, 5)})
    one = FedAvg().aggregate(start, updates).shared["w"]
    other = FedAvg().aggregate(start, orders[order % len(orders)]).shared["w"]
    assert torch.equal(one, other)
    expected = sum(n * u.shared["w"].double().numpy() for n, u in zip(rows, updates, strict=True))
    torch.testing.assert_close(one.double().numpy(), expected / sum(rows), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shares", ["adapter", "nothing"])
def test_join_undoes_split(shares):
    base = base_of("mixtral")
    state = grown(newborn(base, "a"), 3)
    again = join(*split(state, shares))
    for part, other in ((again.adapter, state.adapter), (again.graft, state.graft)):
        assert part.keys() == other.keys()
        assert all(torch.equal(part[name], other[name]) for name in part)


def test_unstack_undoes_stack():
    base = base_of("qwen2_moe")
    states = [grown(newborn(base, c), i) for i, c in enumerate("ab")]
    for state, again in zip(states, unstack(stack(states), 2), strict=True):
        assert all(torch.equal(state.graft[n], again.graft[n]) for n in state.graft)


@pytest.mark.parametrize("kind", STRATEGIES)
def test_no_private_tensor_in_any_update(kind):
    """Names that look shared do not help: the graft's field has no way into an update."""
    base = base_of("mixtral")
    state = newborn(base, "a")
    disguised = ClientState(
        state.adapter,
        {**state.graft, "model.layers.0.self_attn.q_proj.lora_A.copy": torch.ones(2)},
    )
    shared, private = split(disguised, STRATEGIES[kind]().shares)
    assert not set(shared) & set(disguised.graft)
    addresses = {value.data_ptr() for value in disguised.graft.values()}
    assert not {value.data_ptr() for value in shared.values()} & addresses
    assert private.graft.keys() == disguised.graft.keys()
    projections = find_projections(base.model, base.lora)
    assert {name.rpartition(".")[0] for name in shared} <= set(projections)
    if kind == "local-only":
        assert not shared


def test_local_only_changes_nothing_on_the_server():
    start = LocalOnly().init({"w": torch.ones(2)})
    assert LocalOnly().aggregate(start, []) is start
