import copy

import pytest
import torch
from families import FAMILIES, HIDDEN, double
from peft import LoraConfig, get_peft_model
from torch import nn

from pomona.errors import PomonaError
from pomona.models.experts import enable_checkpointing, find_expert_sites, freeze


def test_freeze():
    model = FAMILIES["phimoe"]().train()
    freeze(model)
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(module.training for module in model.modules())


def attach_trainable(model):
    """Add x @ A to every site's output, as a graft would; return the trainable tensors."""
    generator = torch.Generator().manual_seed(5)
    added = []
    for site in find_expert_sites(model):
        weight = torch.randn(HIDDEN, HIDDEN, generator=generator, dtype=torch.float64) * 0.1
        added.append(weight.requires_grad_())

        def hook(_module, args, kwargs, output, weight=weight):
            return output + (args[0] if args else kwargs["hidden_states"]) @ weight

        site.experts.register_forward_hook(hook, with_kwargs=True)
    return added


def gradients(family, checkpointing):
    """Return the gradients of hooked tensors and how often each site was called in all."""
    model = double(family)
    freeze(model)
    if checkpointing:
        enable_checkpointing(model)
    trainable, calls = attach_trainable(model), []
    for site in find_expert_sites(model):
        site.experts.register_forward_pre_hook(lambda *_: calls.append(1))
    logits = model(input_ids=torch.arange(3, 17).view(2, 7), use_cache=False).logits
    assert len(calls) == len(trainable)
    return torch.autograd.grad(logits.logsumexp(-1).sum(), trainable), len(calls)


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_computes_again_and_leaves_gradients_alone(family):
    plain, once = gradients(family, checkpointing=False)
    recomputed, twice = gradients(family, checkpointing=True)
    assert twice == 2 * once
    for one, other in zip(plain, recomputed, strict=True):
        assert one.abs().max() > 1e-3
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-9)


def test_checkpointing_keeps_evaluation_mode_below_the_layers():
    model = FAMILIES["phimoe"]()
    freeze(model)
    enable_checkpointing(model)
    model(input_ids=torch.arange(3, 9).view(1, 6), use_cache=False)
    training = [module for module in model.modules() if module.training]
    assert training == list(model.model.layers)


@pytest.mark.parametrize("wrap", [False, True], ids=["plain", "peft"])
def test_checkpointing_survives_eval_and_leaves_generation_alone(wrap):
    """A layer that checkpoints drops the key-value cache; that must not happen in `generate`."""
    model = FAMILIES["mixtral"]()
    layers = list(model.model.layers)
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj"])) if wrap else model
    freeze(model)
    prompt = torch.arange(3, 13).view(2, 5)
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    before = model.generate(input_ids=prompt, **options)
    enable_checkpointing(model)
    for _ in range(2):
        model(input_ids=prompt, use_cache=False)
        assert all(layer.training for layer in layers)
        assert torch.equal(model.generate(input_ids=prompt, **options), before)
        model.eval()


def test_a_copied_model_checkpoints_its_own_layers():
    model = FAMILIES["mixtral"]()
    freeze(model)
    enable_checkpointing(model)
    twin = copy.deepcopy(model)
    twin(input_ids=torch.arange(3, 9).view(1, 6), use_cache=False)
    assert twin.model.layers[0].training and not model.model.layers[0].training


def test_checkpointing_needs_layers_that_can_be_computed_again():
    with pytest.raises(PomonaError, match="Linear has no layer that can be computed again"):
        enable_checkpointing(nn.Linear(2, 2))
