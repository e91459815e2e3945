"""Reconstruction as one writes it down first: activations are kept, a pruned model is a model of its own."""

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as fn
from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

_BATCH = 16


@torch.no_grad()
def activations(model: LlamaForCausalLM, windows_BT: Tensor) -> list[Tensor]:
    """Return every layer's FFN activations over all tokens [N, F]."""
    kept: list[list[Tensor]] = [[] for _ in model.model.layers]
    handles = [
        layer.mlp.down_proj.register_forward_pre_hook(
            lambda _module, args, own=own: own.append(args[0].flatten(0, 1))
        )
        for layer, own in zip(model.model.layers, kept, strict=True)
    ]
    for ids_BT in windows_BT.split(_BATCH):
        model(input_ids=ids_BT, use_cache=False)
    for handle in handles:
        handle.remove()
    return [torch.cat(own) for own in kept]


def variances(model: LlamaForCausalLM, windows: Mapping[str, Tensor]) -> list[Tensor]:
    """Return every domain's variance of every layer's channels [L, F]."""
    kept = {name: activations(model, own) for name, own in windows.items()}
    return [
        torch.stack([h_NF.double().var(0, unbiased=False) for h_NF in own]) for own in kept.values()
    ]


def scores(model: LlamaForCausalLM, variance_LF: Tensor) -> Tensor:
    """Return WIFV: the variance of a channel times the squared norm of its column [L, F]."""
    squares = [layer.mlp.down_proj.weight.double().square().sum(0) for layer in model.model.layers]
    return variance_LF * torch.stack(squares)


def pruned(model: LlamaForCausalLM, kept_LW: Tensor) -> LlamaForCausalLM:
    """Return a copy of a model whose other channels are zero."""
    own = copy.deepcopy(model)
    for layer, kept_W in zip(own.model.layers, kept_LW, strict=True):
        mask_F = torch.zeros(layer.mlp.down_proj.in_features)
        mask_F[kept_W] = 1.0
        layer.mlp.down_proj.weight.data.mul_(mask_F)
    return own


@torch.no_grad()
def perplexities(
    model: LlamaForCausalLM, kept: Sequence[Tensor], windows: Sequence[Tensor]
) -> Tensor:
    """Return the perplexity of every pruned model on every domain [M, M]; all models at once."""
    models = [pruned(model, kept_LW) for kept_LW in kept]
    return torch.tensor(
        [[_perplexity(own, windows_BT) for windows_BT in windows] for own in models],
        dtype=torch.float64,
    )


def _perplexity(model: nn.Module, windows_BT: Tensor) -> float:
    total, count = 0.0, 0
    for ids_BT in windows_BT.split(_BATCH):
        logits_BTV = model(input_ids=ids_BT, use_cache=False).logits[:, :-1].float()
        target_BT = ids_BT[:, 1:]
        total += float(
            fn.cross_entropy(logits_BTV.flatten(0, 1), target_BT.flatten(), reduction="sum")
        )
        count += target_BT.numel()
    return float(torch.tensor(total / count, dtype=torch.float64).exp())


@torch.no_grad()
def assembled(
    model: LlamaForCausalLM, kept: Sequence[Tensor], router_LED: Tensor, config: MixtralConfig
) -> MixtralForCausalLM:
    """Return a mixture of models that are cut to their channels [L, W], one after another in memory."""
    experts = []
    for kept_LW in kept:
        own = copy.deepcopy(model)
        for layer, kept_W in zip(own.model.layers, kept_LW, strict=True):
            mlp = layer.mlp
            mlp.gate_proj.weight = nn.Parameter(mlp.gate_proj.weight[kept_W])
            mlp.up_proj.weight = nn.Parameter(mlp.up_proj.weight[kept_W])
            mlp.down_proj.weight = nn.Parameter(mlp.down_proj.weight[:, kept_W])
        experts.append(own)
    mixture = MixtralForCausalLM(config).to(model.dtype)
    mixture.load_state_dict(
        {n: v for n, v in model.state_dict().items() if ".mlp." not in n}, strict=False
    )
    for number, layer in enumerate(mixture.model.layers):
        mlps = [own.model.layers[number].mlp for own in experts]
        layer.mlp.experts.gate_up_proj.copy_(
            torch.stack([torch.cat([m.gate_proj.weight, m.up_proj.weight]) for m in mlps])
        )
        layer.mlp.experts.down_proj.copy_(torch.stack([m.down_proj.weight for m in mlps]))
        layer.mlp.gate.weight.copy_(router_LED[number])
    return mixture
