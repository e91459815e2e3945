"""Nats of tokens straight from hidden states: logits as wide as the vocabulary never exist all at once.

Behind a frozen output embedding the gradient of the hidden states is known as soon as a token's logits are, so
that a chunk of tokens is through with its logits before the next one begins. The readable twin is
`fn.cross_entropy` of all logits.
"""

from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_LOGITS_ON_CPU = 1 << 19  # what stays in a core's cache
_LOGITS_ELSEWHERE = 1 << 26  # other devices want large products
_LEAST = 64  # tokens for which it pays to read the whole embedding


def nats_of(
    hidden_ZD: Float[Tensor, "Z D"], head: nn.Linear, token_Z: Int[Tensor, " Z"]
) -> Float[Tensor, " Z"]:
    """Return −log softmax(head · h)[token] [Z], float32; the head is constant."""
    return cast(Tensor, _Nats.apply(hidden_ZD, head.weight, head.bias, token_Z))


class _Nats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ZD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, token_Z: Tensor
    ) -> Tensor:
        nats_Z = hidden_ZD.new_empty(len(hidden_ZD), dtype=torch.float32)
        pull_ZD = torch.empty_like(hidden_ZD) if ctx.needs_input_grad[0] else None
        size = _tokens_at_once(hidden_ZD.device, len(weight_VD))
        for begin in range(0, len(hidden_ZD), size):
            part = slice(begin, begin + size)
            logits_ZV = nn.functional.linear(hidden_ZD[part], weight_VD, bias_V).float()
            total_Z1 = logits_ZV.logsumexp(1, keepdim=True)
            token_Z1 = token_Z[part].unsqueeze(1)
            nats_Z[part] = (total_Z1 - logits_ZV.gather(1, token_Z1)).squeeze(1)
            if pull_ZD is not None:
                share_ZV = logits_ZV.sub_(total_Z1).exp_()
                share_ZV.scatter_add_(1, token_Z1, -torch.ones_like(total_Z1))
                torch.mm(share_ZV.to(weight_VD.dtype), weight_VD, out=pull_ZD[part])
        ctx.save_for_backward(pull_ZD)
        return nats_Z

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - the decorator hides names
        ctx: Any, *pulls: Tensor
    ) -> Any:
        (pull_Z,) = pulls
        (pull_ZD,) = ctx.saved_tensors
        return pull_ZD * pull_Z.unsqueeze(1).to(pull_ZD.dtype), None, None, None


def _tokens_at_once(device: torch.device, vocabulary: int) -> int:
    at_once = _LOGITS_ON_CPU if device.type == "cpu" else _LOGITS_ELSEWHERE
    return max(_LEAST, at_once // vocabulary)
