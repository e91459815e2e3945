"""Stacked LoRA against PEFT and against one client at a time; the PEFT folder both ways."""

import json

import pytest
import torch
from families import FAMILIES, llama
from peft import LoraConfig, PeftModel, get_peft_model

from pomona.errors import PomonaError
from pomona.models.lora import LoRA, attach_lora, find_projections, init_lora
from pomona.models.peft_format import read_adapter, write_adapter

TOKENS = torch.randint(3, 60, (6, 9), generator=torch.Generator().manual_seed(3))
WITH_QKV = [n for n in FAMILIES if not n.startswith("deepseek")]


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def moved(model, lora, seed):
    generator = torch.Generator().manual_seed(seed)
    fresh = init_lora(model, lora, generator)
    return {n: torch.randn(t.shape, generator=generator) * 0.2 for n, t in fresh.items()}


def stacked(*states):
    return {n: torch.stack([s[n] for s in states]) for n in states[0]}


@pytest.mark.parametrize("family", [*WITH_QKV, "llama"])
def test_adapter_folder_loads_in_peft_with_identical_logits(family, tmp_path):
    model = llama() if family == "llama" else FAMILIES[family]()
    lora = LoRA(3, 5.0)
    tensors = moved(model, lora, 1)
    write_adapter(tmp_path / "a", lora, tensors, "base")
    with attach_lora(model, lora, stacked(tensors)):
        ours = logits(model)
    plain = logits(model)
    theirs = logits(PeftModel.from_pretrained(model, tmp_path / "a").eval())
    if family == "jamba":  # its state-space layers sum in another order under PEFT
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=5e-5)
    else:
        assert torch.equal(ours, theirs)
    assert not torch.equal(ours, plain)


def test_an_adapter_that_peft_wrote_is_read(tmp_path):
    model = llama()
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "o_proj"], init_lora_weights=False
    )
    wrapped = get_peft_model(model, config).eval()
    theirs = logits(wrapped)
    wrapped.save_pretrained(tmp_path)
    lora, tensors = read_adapter(tmp_path)
    assert lora == LoRA(4, 8.0, ("o_proj", "q_proj"))
    fresh = llama()
    with attach_lora(fresh, lora, stacked(tensors)):
        torch.testing.assert_close(logits(fresh), theirs)


def test_clients_in_one_batch_equal_clients_one_by_one():
    model, lora = FAMILIES["mixtral"](), LoRA(2, 4.0)
    states = [moved(model, lora, c) for c in range(3)]
    with attach_lora(model, lora, stacked(*states)):
        together = logits(model)
    for client, state in enumerate(states):
        rows = TOKENS[2 * client : 2 * client + 2]
        with attach_lora(model, lora, stacked(state)):
            torch.testing.assert_close(together[2 * client : 2 * client + 2], logits(model, rows))


def test_fresh_lora_changes_nothing_and_is_a_function_of_its_seed():
    model, lora = FAMILIES["mixtral"](), LoRA()
    plain = logits(model)
    fresh = init_lora(model, lora, torch.Generator().manual_seed(0))
    with attach_lora(model, lora, stacked(fresh)):
        assert torch.equal(logits(model), plain)
    again = init_lora(model, lora, torch.Generator().manual_seed(0))
    assert all(torch.equal(fresh[n], again[n]) for n in fresh)
    assert len(find_projections(model, lora)) == 2 * 3


def test_a_target_the_model_lacks_is_named():
    with pytest.raises(PomonaError, match=r'"w_pack" is no linear layer .* called .*q_proj'):
        find_projections(llama(), LoRA(targets=("q_proj", "w_pack")))
    with pytest.raises(PomonaError, match='target "lm_head" is the output embedding'):
        find_projections(llama(), LoRA(targets=("q_proj", "lm_head")))
    with pytest.raises(PomonaError, match="rank 0"):
        LoRA(rank=0)


@pytest.mark.parametrize("change", [{"use_dora": True}, {"rank_pattern": {"q_proj": 2}}])
def test_adapters_that_are_not_plain_lora_are_refused(tmp_path, change):
    model, lora = llama(), LoRA()
    write_adapter(tmp_path / "a", lora, moved(model, lora, 0), "base")
    path = tmp_path / "a/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(PomonaError, match=r"plain LoRA|by pattern"):
        read_adapter(tmp_path / "a")
    with pytest.raises(PomonaError, match=r"holds no adapter_config.json"):
        read_adapter(tmp_path)
