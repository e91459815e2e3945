"""LoRA on the experts against the same change made to the weights, and against PEFT."""

import pytest
import torch
from families import FAMILIES
from models.test_lora import logits, moved, stacked
from peft import PeftModel

from pomona.models.experts import find_expert_sites
from pomona.models.lora import LoRA, attach_lora
from pomona.models.peft_format import read_adapter, write_adapter

TOKENS = torch.randint(3, 60, (6, 9), generator=torch.Generator().manual_seed(3))
COMMON = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoeshared", "gpt_oss"]


@pytest.mark.parametrize("family", COMMON)
def test_it_is_the_change_of_the_weights(family):
    model, lora = FAMILIES[family](), LoRA(2, 4.0, experts=True)
    tensors = moved(model, lora, 1)
    with attach_lora(model, lora, stacked(tensors)):
        ours = logits(model)
    plain = logits(model)
    attention = LoRA(2, 4.0)
    for site in find_expert_sites(model):
        for part in ("gate_up_proj", "down_proj"):
            a, b = (tensors[f"{site.name}.{part}.{f}"] for f in ("lora_A", "lora_B"))
            change = lora.scaling * b @ a
            weight = getattr(site.experts, part)
            weight.data += change.mT if site.experts.is_transposed else change
    with attach_lora(model, attention, stacked({n: v for n, v in tensors.items() if v.ndim == 2})):
        torch.testing.assert_close(ours, logits(model), rtol=1e-4, atol=1e-4)
    assert (ours - plain).abs().max() > 1e-3


@pytest.mark.parametrize("family", COMMON)
def test_newborn_changes_nothing_to_the_bit(family):
    model, lora = FAMILIES[family](), LoRA(2, 4.0, experts=True)
    from pomona.models.lora import init_lora

    fresh = init_lora(model, lora, torch.Generator().manual_seed(0))
    plain = logits(model)
    with attach_lora(model, lora, stacked(fresh)):
        assert torch.equal(logits(model), plain)


def test_the_folder_loads_in_peft_and_back(tmp_path):
    model, lora = FAMILIES["mixtral"](), LoRA(2, 4.0, layers=(1,), experts=True)
    tensors = moved(model, lora, 1)
    write_adapter(tmp_path / "a", lora, tensors, "base")
    again, read = read_adapter(tmp_path / "a")
    assert again == LoRA(2, 4.0, tuple(sorted(lora.targets)), (1,), True)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[n], v) for n, v in tensors.items())
    with attach_lora(model, lora, stacked(tensors)):
        ours = logits(model)
    theirs = logits(PeftModel.from_pretrained(model, tmp_path / "a").eval())
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
