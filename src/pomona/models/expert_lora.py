"""LoRA of C clients on every pretrained expert of a mixture, for methods that tune them all.

A in front of and B behind the fused weights, as PEFT has it on `experts.gate_up_proj` and
`experts.down_proj`: A [C, E, R, in], B [C, E, out, R]. Tokens of several clients meet in one expert, so
every token goes through the factors of all clients and keeps what its own gave.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from pomona.models.attachment import Attachment
from pomona.models.experts import ExpertSite
from pomona.models.split import Present

PARTS = ("gate_up_proj", "down_proj")


def expert_sizes(site: ExpertSite) -> dict[str, tuple[int, int]]:
    """Return (in, out) of both fused weights."""
    return {
        "gate_up_proj": (site.hidden_size, 2 * site.width),
        "down_proj": (site.width, site.hidden_size),
    }


def attach_expert_lora(
    sites: Sequence[ExpertSite],
    scaling: float,
    tensors: Mapping[str, Tensor],
    present: Present,
) -> Attachment:
    """Hook stacked LoRA (`SITE.PART.lora_A`, `.lora_B`) onto every expert.

    The hook adds Σ_k G_k(x) · (E'(x) − E(x)) over a token's experts, which is zero to the bit while B is.
    """
    handles = [
        site.experts.register_forward_hook(_hook(site, scaling, tensors, present), with_kwargs=True)
        for site in sites
    ]
    return Attachment(tuple(handles))


def _hook(
    site: ExpertSite, scaling: float, tensors: Mapping[str, Tensor], present: Present
) -> Callable[..., Tensor]:
    pairs = {
        part: tuple(tensors[f"{site.name}.{part}.{factor}"] for factor in ("lora_A", "lora_B"))
        for part in PARTS
    }
    clients = len(pairs[PARTS[0]][0])

    def hook(
        _module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor
    ) -> Tensor:
        names = ("hidden_states", "top_k_index", "top_k_weights")
        given = dict(zip(names, args, strict=False)) | kwargs
        x_ND, chosen_NK, weight_NK = (given[name] for name in names)
        client_N = present.of(x_ND, clients).client_N
        added_ND = torch.zeros_like(x_ND, dtype=pairs[PARTS[0]][0].dtype)
        for expert in range(site.num_experts):
            token_Z, place_Z = (chosen_NK == expert).nonzero(as_tuple=True)
            if len(token_Z) == 0:
                continue
            one = {part: (a[:, expert], b[:, expert]) for part, (a, b) in pairs.items()}
            change_ZD = expert_change(site, expert, scaling, one, x_ND[token_Z], client_N[token_Z])
            weighted_ZD = weight_NK[token_Z, place_Z].unsqueeze(1) * change_ZD
            added_ND = added_ND.index_add(0, token_Z, weighted_ZD.to(added_ND.dtype))
        return output + added_ND.reshape(output.shape).to(output.dtype)

    return hook


def expert_change(
    site: ExpertSite,
    expert: int,
    scaling: float,
    pairs: Mapping[str, tuple[Tensor, Tensor]],
    x_ZD: Tensor,
    client_Z: Tensor,
) -> Tensor:
    """Return E'(x) − E(x) [Z, D] of one expert in the dtype of the factors."""

    def update(value_ZI: Tensor, part: str) -> Tensor:
        return mixed_low_rank(value_ZI, *pairs[part], client_Z) * scaling

    kind = pairs["down_proj"][0].dtype
    both_ZX = site.gate_up(x_ZD, expert).to(kind)
    # Laid out as their sums: some kernels round strided values in another way.
    gate_ZW, up_ZW = (half.contiguous() for half in site.halves(both_ZX))
    more_gate_ZW, more_up_ZW = site.halves(update(x_ZD, "gate_up_proj"))
    own_ZW = site.activate(gate_ZW + more_gate_ZW, up_ZW + more_up_ZW)
    moved_ZW = own_ZW - site.activate(gate_ZW, up_ZW)
    down_ZD = site.down(moved_ZW.to(x_ZD.dtype), expert, bias=False)
    return down_ZD.to(kind) + update(own_ZW, "down_proj")


def mixed_low_rank(x_ZI: Tensor, a_CRI: Tensor, b_COR: Tensor, client_Z: Tensor) -> Tensor:
    """Return B_c · A_c · x of every token's own client c [Z, O], in two products over all clients."""
    clients, rank, _ = a_CRI.shape
    through_ZCR = (x_ZI.to(a_CRI.dtype) @ a_CRI.flatten(0, 1).T).unflatten(1, (clients, rank))
    own_ZC = nn.functional.one_hot(client_Z, clients).to(through_ZCR.dtype)
    kept_ZCR = through_ZCR * own_ZC.unsqueeze(2)
    return cast(Tensor, kept_ZCR.flatten(1) @ b_COR.transpose(1, 2).flatten(0, 1))
