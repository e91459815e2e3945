import pytest
import torch
from families import FAMILIES, VOCABULARY, double, llama
from peft import LoraConfig, get_peft_model

from pomona.models.logits import labelled_logits

ROWS, LENGTH = 3, 9


def batch():
    """Right-padded rows with answers of 4, 2 and 1 tokens."""
    ids = torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    attention = torch.ones(ROWS, LENGTH, dtype=torch.int64)
    label = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
    label[0, 5:], label[1, 3:5], label[2, 1] = True, True, True
    attention[1, 5:] = attention[2, 7:] = 0
    return ids * attention, attention, label


def at_labels(logits, label):
    """Row by row: the logits one position before every labelled token."""
    return torch.stack(
        [logits[b, t - 1] for b in range(ROWS) for t in range(1, LENGTH) if label[b, t]]
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_logits_as_the_whole_model(family):
    model = double(family)
    ids, attention, label = batch()
    with torch.no_grad():
        whole = model(input_ids=ids, attention_mask=attention, use_cache=False).logits
        few = labelled_logits(model, ids, attention, label)
    assert few.shape == (7, VOCABULARY)
    torch.testing.assert_close(few, at_labels(whole, label), rtol=1e-9, atol=1e-9)
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_granites_scaling_is_kept():
    model = double("granitemoe")
    with torch.no_grad():
        scaled = labelled_logits(model, *batch())
        model.config.logits_scaling = 1.0
        for module in model.modules():
            if hasattr(module, "logits_scaling"):
                module.logits_scaling = 1.0
        unscaled = labelled_logits(model, *batch())
    torch.testing.assert_close(scaled * 4, unscaled)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "granitemoe", "lfm2_moe"])
def test_the_same_gradients_as_the_whole_model(family):
    ids, attention, label = batch()
    found = []
    for thin in (True, False):
        model = double(family)
        if thin:
            logits = labelled_logits(model, ids, attention, label)
        else:
            whole = model(input_ids=ids, attention_mask=attention, use_cache=False).logits
            logits = at_labels(whole, label)
        torch.nn.functional.cross_entropy(logits, ids[label]).backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 10
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-8, atol=1e-10)


def test_a_peft_wrapped_model():
    ids, attention, label = batch()
    plain = labelled_logits(llama(), ids, attention, label)
    wrapped = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    torch.testing.assert_close(labelled_logits(wrapped, ids, attention, label), plain)


def test_a_mask_of_integers_and_a_label_at_the_start():
    ids, attention, label = batch()
    model = llama()
    expected = labelled_logits(model, ids, attention, label)
    label[:, 0] = True  # nothing precedes it, so nothing predicts it
    assert torch.equal(labelled_logits(model, ids, attention, label.long()), expected)


def test_no_label_at_all():
    ids, attention, label = batch()
    logits = labelled_logits(llama(), ids, attention, torch.zeros_like(label))
    assert logits.shape == (0, VOCABULARY)


def test_the_hook_comes_off_after_an_error():
    model = llama()
    ids, attention, label = batch()
    with pytest.raises(IndexError):
        labelled_logits(model, ids + VOCABULARY, attention, label)
    assert not model.get_output_embeddings()._forward_pre_hooks
