"""Logits only where there is a label: the vocabulary projection is most of a small model's cost."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
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
    given = {"input_ids": input_ids_BT, "attention_mask": attention_mask_BT, "use_cache": False}
    return _thinned(model, label_mask_BT, given)


def packed_logits(
    model: nn.Module, ids_N: Int[Tensor, " N"], label_N: Bool[Tensor, " N"], packing: Packing
) -> Float[Tensor, "Z V"]:
    """Return the logits that predict each labelled token of packed rows, whose first carries none."""
    return _thinned(model, label_N.unsqueeze(0), packed_arguments(ids_N, packing))


def _thinned(model: nn.Module, label_BT: Tensor, given: dict[str, Any]) -> Tensor:
    """A hook thins the hidden states out just before the output embedding.

    Whatever a family does to its logits afterwards (scaling, soft-capping) stays as it is.
    """
    predict_BT = torch.zeros_like(label_BT, dtype=torch.bool)
    predict_BT[:, :-1] = label_BT[:, 1:]

    def thin_out(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][predict_BT].unsqueeze(0), *args[1:])

    head = model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    with Attachment((head.register_forward_pre_hook(thin_out),)):  # pyright: ignore
        output = model(**given)
    return output.logits[0]
