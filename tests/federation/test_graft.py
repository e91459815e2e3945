"""The graft against a plain, slow twin, and everything transformers should still do with it."""

import pytest
import torch
from families import FAMILIES
from laws.test_federation_laws import TOKENS, base_of, grown, logits, newborn
from torch.nn import functional as fn

from pomona.errors import PomonaError
from pomona.federation.gates import measure_gates
from pomona.federation.graft import Graft, selected_experts
from pomona.federation.private_expert import gate_value
from pomona.federation.update import ClientState, stack
from pomona.models.experts import enable_checkpointing
from pomona.models.split import Even


def twin(site, graft, x, index, weight, tensors):
    """The private expert with its weights written out: W + scaling · B · A or W + Δ, then a plain FFN.

    `index` and `weight` [N, K] are the router's.
    """
    expert = int(tensors["expert"])
    resident = site.expert(expert)

    def linear(value, part):
        weight, bias = getattr(resident, part), getattr(resident, f"{part}_bias")
        if graft.weights == "full":
            extra = tensors.get(f"{part}.delta_bias")
            weight = weight + tensors[f"{part}.delta"]
            assert (extra is None) == (bias is None)
            bias = None if bias is None else bias + extra
        else:
            weight = weight + graft.scaling * tensors[f"{part}.lora_B"] @ tensors[f"{part}.lora_A"]
        return fn.linear(value, weight, bias)

    own = linear(site.activate(linear(x, "gate"), linear(x, "up")), "down")
    if graft.form == "delta":
        own = own - site.apply(x, expert)
    openness = {
        "none": lambda: torch.ones(len(x)),
        "resident": lambda: torch.stack(
            [sum(w[index[n] == expert], torch.tensor(0.0)) for n, w in enumerate(weight)]
        ),
    }.get(graft.gate, lambda: torch.sigmoid(x @ tensors["gate"] + tensors.get("gate_bias", 0.0)))
    return openness().unsqueeze(1) * own


KINDS = {
    "delta": Graft(rank=3, bias=True),
    "copy": Graft(rank=3, form="copy", bias=True),
    "no gate": Graft(rank=3, gate="none", count=2),
    "copy, resident": Graft(rank=3, form="copy", gate="resident", count=2),
    "full": Graft(weights="full", count=3),
    "full copy": Graft(weights="full", form="copy", bias=True),
    "full, resident": Graft(weights="full", gate="resident"),
}


def own_tensors(site, graft, tensors):
    """Each private expert's tensors at a site, told apart by the names that the docs give."""
    numbers = [""] if graft.count == 1 else [f"{i}." for i in range(graft.count)]
    found = [
        {
            name.removeprefix(f"{site.name}.{number}"): value
            for name, value in tensors.items()
            if name.startswith(f"{site.name}.{number}")
        }
        for number in numbers
    ]
    assert sum(map(len, found)) == sum(name.startswith(f"{site.name}.") for name in tensors)
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("graft", KINDS.values(), ids=KINDS)
def test_hook_equals_the_written_out_expert(family, graft):
    base = base_of(family, graft)
    states = [grown(newborn(base, c, i), i) for i, c in enumerate("abc")]
    seen = []
    site = base.sites[-1]
    before = site.experts.register_forward_hook(lambda m, a, o: seen.append((a, o)))
    with base.attach(ClientState(graft=stack(states).graft)):
        after = site.experts.register_forward_hook(lambda m, a, o: seen.append((a, o)))
        with torch.no_grad():
            base.model(input_ids=TOKENS[:3], use_cache=False)
        after.remove()
    before.remove()
    (call, plain), (_, with_graft) = seen
    call = [value.unflatten(0, (3, -1)) for value in call]
    added = (with_graft - plain).unflatten(0, (3, -1))
    for client, state in enumerate(states):
        expected = sum(
            twin(site, graft, *(value[client] for value in call), own)
            for own in own_tensors(site, graft, state.graft)
        )
        torch.testing.assert_close(added[client], expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("graft", KINDS.values(), ids=KINDS)
def test_openness_is_measured_per_layer_over_real_tokens(graft):
    """The mean weight of a layer's private experts, against the twin's weights for a constant output."""
    base = base_of("mixtral", graft)
    state = grown(newborn(base, "a", 1), 3)
    mask = torch.arange(12).expand(4, 12) < torch.tensor([[12], [3], [7], [1]])
    seen = []
    handles = [
        site.experts.register_forward_hook(lambda m, a, o: seen.append(a)) for site in base.sites
    ]
    stacked = stack([state]).graft
    with measure_gates(base.sites, graft, stacked, mask_BT=mask) as gates, torch.no_grad():
        base.model(input_ids=TOKENS, use_cache=False)
    for handle in handles:
        handle.remove()
    expected = []
    for site, (x, index, weight) in zip(base.sites, seen, strict=True):
        means = []
        for own in own_tensors(site, graft, state.graft):
            if graft.gate == "none":
                open_N = torch.ones(len(x))
            elif graft.gate == "resident":
                open_N = (weight * (index == int(own["expert"]))).sum(1)
            else:
                open_N = torch.sigmoid(x @ own["gate"] + own.get("gate_bias", 0.0))
            means.append(open_N[mask.flatten()].mean())
        expected.append(float(torch.stack(means).mean()))
    assert gates.mean_LC[:, 0].tolist() == pytest.approx(expected, rel=1e-5)
    assert gates.mean_LC.shape == (len(base.sites), 1)


def test_what_a_graft_trains_and_how_it_is_called():
    """Names and shapes that a folder on disk has; one graft has no number."""
    names = {
        "expert": [],
        "gate": [32],
        "gate.lora_A": [2, 32],
        "gate.lora_B": [16, 2],
        "up.lora_A": [2, 32],
        "up.lora_B": [16, 2],
        "down.lora_A": [2, 16],
        "down.lora_B": [32, 2],
    }
    lora = {n: shape for n, shape in names.items() if n != "gate"}
    whole = {"expert": [], "gate.delta": [16, 32], "up.delta": [16, 32], "down.delta": [32, 16]}
    biases = {"gate.delta_bias": [16], "up.delta_bias": [16], "down.delta_bias": [32]}
    for family, graft, expected in (
        ("mixtral", Graft(rank=2), names),
        ("mixtral", Graft(rank=2, bias=True), names | {"gate_bias": []}),
        ("mixtral", Graft(rank=2, gate="none"), lora),
        ("mixtral", Graft(gate="resident", weights="full"), whole),
        ("gpt_oss", Graft(gate="resident", weights="full"), whole | biases),
        (
            "mixtral",
            Graft(rank=2, count=2),
            {f"{i}.{name}": shape for i in range(2) for name, shape in names.items()},
        ),
    ):
        base = base_of(family, graft)
        tensors = newborn(base, "a").graft
        found = {name: list(value.shape) for name, value in tensors.items()}
        prefixes = [site.name for site in base.sites]
        assert found == {f"{p}.{name}": shape for p in prefixes for name, shape in expected.items()}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"count": 0}, "graft count 0 is not positive"),
        ({"gate": "open"}, 'graft gate "open" is unknown; use one of router, zero, none, resident'),
        ({"weights": "half"}, 'graft weights "half" is unknown; use one of lora, full'),
        (
            {"gate": "none", "bias": True},
            'graft bias needs a gate that is trained, and gate "none"',
        ),
        ({"gate": "resident", "bias": True}, "graft bias needs a gate that is trained"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, says):
    with pytest.raises(PomonaError, match=says):
        Graft(**settings)


def test_published_birth_is_not_silent():
    base = base_of("mixtral", Graft(rank=2, form="copy"))
    assert not torch.equal(logits(base, stack([newborn(base, "a")])), logits(base, ClientState()))


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v2", "gpt_oss"])
def test_generation_uses_the_graft_with_and_without_cache(family):
    base = base_of(family)
    state = grown(newborn(base, "a"), 5)

    def tokens(cache):
        return base.model.generate(
            TOKENS[:2],
            attention_mask=torch.ones_like(TOKENS[:2]),
            max_new_tokens=8,
            do_sample=False,
            use_cache=cache,
            pad_token_id=0,
            eos_token_id=63,
        )

    plain = tokens(True)
    with base.attach_one(state):
        cached, uncached = tokens(True), tokens(False)
    assert torch.equal(cached, uncached)
    assert not torch.equal(cached, plain)
    assert torch.equal(tokens(True), plain)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_activation_checkpointing_gives_the_same_gradients(family):
    gradients = []
    for checkpointing in (False, True):
        base = base_of(family)
        if checkpointing:
            enable_checkpointing(base.model)
        state = stack([grown(newborn(base, c, i), i) for i, c in enumerate("ab")])
        leaves = [
            v.requires_grad_()
            for v in (*state.adapter.values(), *state.graft.values())
            if v.is_floating_point()
        ]
        with base.attach(state):
            base.model(input_ids=TOKENS, use_cache=False).logits.square().mean().backward()
        gradients.append([leaf.grad for leaf in leaves])
    assert len(gradients[0]) > 10
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)


def test_base_saves_and_loads_with_a_graft_attached(tmp_path):
    from transformers import AutoModelForCausalLM

    base = base_of("mixtral")
    plain = logits(base, ClientState())
    with base.attach_one(grown(newborn(base, "a"), 1)):
        base.model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(input_ids=TOKENS, use_cache=False).logits, plain)


def test_bfloat16_base_with_float32_graft():
    base = base_of("mixtral")
    base.model.bfloat16()
    newborn_state = newborn(base, "a")
    plain = logits(base, ClientState())
    assert plain.dtype == torch.bfloat16
    assert torch.equal(logits(base, stack([newborn_state])), plain)
    moved = logits(base, stack([grown(newborn_state, 2)]))
    assert moved.isfinite().all()
    assert not torch.equal(moved, plain)


def test_graft_tensors_say_which_expert_and_how_open():
    base = base_of("mixtral")
    state = newborn(base, "a", 1)
    assert selected_experts(base.sites, state.graft) == [[1], [2]]
    site = base.sites[0]
    row = site.router_row(1)
    assert torch.equal(state.graft[f"{site.name}.gate"], row)
    x_ND = torch.randn(6, 32)
    own = {"gate": row.unsqueeze(0)}
    found_N = gate_value(x_ND, own, Even(6, 1, x_ND.device))
    torch.testing.assert_close(found_N, torch.sigmoid(x_ND @ row))
