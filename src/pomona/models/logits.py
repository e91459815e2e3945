"""Logits only where there is a label: the vocabulary projection is most of a small model's cost."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from pomona.models.attachment import Attachment
from pomona.models.packing import Packing, packed_arguments
from pomona.shapes import AttentionMask, TokenMask, Tokens


def labelled_logits(
    model: nn.Module,
    input_ids_BT: Tokens,
    attention_mask_BT: TokenMask | AttentionMask,
    label_mask_BT: TokenMask | AttentionMask,
) -> Float[Tensor, "Z V"]:
    """Return the logits that predict each labelled token, row by row, [Z, V].

    Token t of a row is predicted from position t − 1, so position 0 can carry no label. Z may be 0.
    """
    predict_BT = torch.zeros_like(label_mask_BT, dtype=torch.bool)
    predict_BT[:, :-1] = label_mask_BT[:, 1:]
    given = {"input_ids": input_ids_BT, "attention_mask": attention_mask_BT, "use_cache": False}
    return _logits_at(model, predict_BT.flatten().nonzero().squeeze(1), given)


def packed_logits(
    model: nn.Module, ids_N: Int[Tensor, " N"], token_Z: Int[Tensor, " Z"], packing: Packing
) -> Float[Tensor, "Z V"]:
    """Return the logits that predict some tokens of packed rows, in their order; none may be a row's first."""
    return _logits_at(model, token_Z - 1, packed_arguments(ids_N, packing))


def _logits_at(model: nn.Module, place_Z: Tensor, given: dict[str, Any]) -> Tensor:
    """A hook takes the hidden states that are asked for just before the output embedding.

    Whatever a family does to its logits afterwards (scaling, soft-capping) stays as it is.
    """

    def take(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0].flatten(0, 1).index_select(0, place_Z).unsqueeze(0), *args[1:])

    head = model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    with Attachment((head.register_forward_pre_hook(take),)):  # pyright: ignore
        output = model(**given)
    return output.logits.squeeze(0)
