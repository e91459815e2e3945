"""The federated shared expert: silent, a graft in what it computes, and everybody's."""

from dataclasses import replace

import pytest
import torch
from families import FAMILIES

from pomona.errors import PomonaError
from pomona.federation.cohort import FrozenBase
from pomona.federation.graft import Graft, attach_graft, init_graft
from pomona.federation.shared_expert import SharedGraft, expert_part, lora_part
from pomona.federation.strategies import STRATEGIES
from pomona.federation.update import ClientState, Update, split, stack
from pomona.models.experts import find_expert_sites, freeze
from pomona.models.lora import LoRA

TOKENS = torch.randint(3, 60, (4, 12), generator=torch.Generator().manual_seed(7))
SOME = ("mixtral", "deepseek_v2", "gpt_oss", "lfm2_moe")
KINDS = {
    "plain": SharedGraft(rank=2),
    "gated": SharedGraft(rank=2, gate="router", bias=True),
    "full": SharedGraft(weights="full", expert=1),
}


def base_of(family: str, together: SharedGraft) -> FrozenBase:
    model = FAMILIES[family]()
    freeze(model)
    sites = tuple(find_expert_sites(model))
    targets = ("q_a_proj", "kv_a_proj_with_mqa") if family == "deepseek_v2" else ("q_proj",)
    graft, expert = Graft(rank=2), together.on(model, sites)
    return FrozenBase(model, LoRA(2, 4.0, targets), graft, sites, shared_expert=expert)


def moved(tensors: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: v + 0.2 * torch.randn(v.shape, generator=generator) for n, v in tensors.items()}


def logits(base: FrozenBase, state: ClientState, tokens=TOKENS) -> torch.Tensor:
    with base.attach(state), torch.no_grad():
        return base.model(input_ids=tokens, use_cache=False).logits


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("together", KINDS.values(), ids=KINDS)
def test_it_is_born_silent_and_then_computes_what_a_graft_does(family, together):
    base = base_of(family, together)
    adapter = base.init_adapter(0)
    plain = logits(base, ClientState())
    assert torch.equal(logits(base, stack([ClientState(adapter)] * 2)), plain)
    expert = base.shared_expert
    assert expert is not None
    own = moved(expert_part(adapter), 1)
    state = ClientState({**lora_part(adapter), **{f"shared_expert.{n}": v for n, v in own.items()}})
    as_private = init_graft(base.sites, together.graft, expert.experts, torch.Generator()) | own
    with attach_graft(base.sites, together.graft, stack([ClientState(graft=as_private)] * 2).graft):
        twin = base.model(input_ids=TOKENS, use_cache=False).logits
    found = logits(base, stack([state] * 2))
    assert torch.equal(found, twin)
    assert not torch.equal(found, plain)


def test_a_cohort_equals_its_clients_one_by_one():
    base = base_of("mixtral", KINDS["gated"])
    states = [ClientState(moved(base.init_adapter(0), seed)) for seed in (1, 2)]
    together = logits(base, stack(states))
    for state, rows, found in zip(states, TOKENS.chunk(2), together.chunk(2), strict=True):
        torch.testing.assert_close(found, logits(base, stack([state]), rows), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [k for k in STRATEGIES if k not in ("flora", "local-only")])
def test_it_is_averaged_with_the_adapter_and_the_choice_of_expert_never_travels(kind):
    """Where the strategy takes tensors by rows the mean of equal updates is what was sent."""
    base = base_of("mixtral", KINDS["gated"])
    strategy = STRATEGIES[kind]()
    adapter = base.init_adapter(0)
    sent, _ = split(ClientState(moved(adapter, 1)), strategy.shares)
    assert all(value.is_floating_point() for value in sent.values())
    first, _ = split(ClientState(adapter), strategy.shares)
    extra = dict(sent)
    if kind == "scaffold":
        extra |= {f"control.{n}": torch.zeros_like(v) for n, v in sent.items()}
    updates = [Update(name, 5, extra, 4.5) for name in "abcde"]
    shared = strategy.aggregate(strategy.init(first), updates).shared
    assert shared.keys() == first.keys()
    changed = [
        n
        for n in expert_part(shared)
        if not torch.equal(shared[f"shared_expert.{n}"], first[f"shared_expert.{n}"])
    ]
    assert changed


def test_layers_without_the_expert_are_told():
    with pytest.raises(PomonaError, match="selection expert 99 is none of the"):
        base_of("mixtral", replace(KINDS["plain"], expert=99))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rank": 0}, "shared_expert: graft rank 0 is not positive"),
        ({"gate": "wide"}, 'shared_expert: graft gate "wide" is unknown'),
        ({"expert": -1}, "shared_expert: selection expert -1 is negative"),
    ],
)
def test_what_cannot_be_is_told(given, message):
    with pytest.raises(PomonaError, match=message):
        SharedGraft(**given)
