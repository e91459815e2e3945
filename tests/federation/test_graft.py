"""The graft against a plain, slow twin, and everything transformers should still do with it."""

import pytest
import torch
from families import FAMILIES
from laws.test_federation_laws import TOKENS, base_of, grown, logits, newborn
from torch.nn import functional as fn

from pomona.federation.graft import Graft, selected_experts
from pomona.federation.private_expert import gate_value
from pomona.federation.update import ClientState, stack
from pomona.models.experts import enable_checkpointing

FORMS = ("delta", "copy")


def twin(site, graft, x, tensors):
    """The private expert with its weights written out: W + scaling · B · A, then a plain FFN."""
    resident = site.expert(int(tensors["expert"]))

    def weight(part, own):
        return own + graft.scaling * tensors[f"{part}.lora_B"] @ tensors[f"{part}.lora_A"]

    def ffn(gate, up, down, bias):
        inner = site.activate(
            fn.linear(x, gate, resident.gate_bias), fn.linear(x, up, resident.up_bias)
        )
        return fn.linear(inner, down, bias)

    own = ffn(
        weight("gate", resident.gate),
        weight("up", resident.up),
        weight("down", resident.down),
        resident.down_bias,
    )
    if graft.form == "delta":
        own = own - site.apply(x, int(tensors["expert"]))
    openness = torch.sigmoid(x @ tensors["gate"] + tensors.get("gate_bias", 0.0))
    return openness.unsqueeze(1) * own


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", FORMS)
def test_hook_equals_the_written_out_expert(family, form):
    base = base_of(family, Graft(rank=3, form=form, bias=True))
    states = [grown(newborn(base, c, i), i) for i, c in enumerate("abc")]
    seen = []
    site = base.sites[-1]
    before = site.experts.register_forward_hook(lambda m, a, o: seen.append((a[0], o)))
    with base.attach(ClientState(graft=stack(states).graft)):
        after = site.experts.register_forward_hook(lambda m, a, o: seen.append((a[0], o)))
        with torch.no_grad():
            base.model(input_ids=TOKENS[:3], use_cache=False)
        after.remove()
    before.remove()
    (x, plain), (_, with_graft) = seen
    added = (with_graft - plain).unflatten(0, (3, -1))
    for client, state in enumerate(states):
        own = {
            n.removeprefix(f"{site.name}."): v
            for n, v in state.graft.items()
            if n.startswith(site.name)
        }
        expected = twin(site, base.graft, x.unflatten(0, (3, -1))[client], own)
        torch.testing.assert_close(added[client], expected, rtol=1e-4, atol=1e-4)


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
    x = torch.randn(1, 6, 32)
    own = {"gate": row.unsqueeze(0)}
    torch.testing.assert_close(gate_value(x, own)[0], torch.sigmoid(x[0] @ row))
