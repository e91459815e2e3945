"""Logits only where there is a label: the vocabulary projection is most of a small model's cost."""

from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as fn

from pomona.models.attachment import Attachment
from pomona.models.nats import nats_of
from pomona.models.packing import Packing, packed_arguments
from pomona.shapes import AttentionMask, TokenMask, Tokens

_HEAD_ENDS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""Whether a model's logits are what its output embedding gives, and nothing else, as its first pass told."""


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


def packed_predictions(
    model: nn.Module,
    ids_N: Int[Tensor, " N"],
    scored_Z: Int[Tensor, " Z"],
    said_Y: Int[Tensor, " Y"],
    packing: Packing,
) -> tuple[Float[Tensor, " Z"], Float[Tensor, "Y V"]]:
    """Return the nats of the tokens at `scored` places of packed rows and the logits that predict those `said`.

    None may be a row's first. Nats need no logits of all tokens at once where the output embedding has the last
    word, which a family that scales or caps its logits does not leave to it.
    """
    given = packed_arguments(ids_N, packing)
    return _predicted(model, scored_Z - 1, ids_N[scored_Z], said_Y - 1, given)


def text_nats(model: nn.Module, ids_BT: Tokens) -> Float[Tensor, "B T-1"]:
    """Return the nats of every token of texts but the first of each row."""
    rows, length = ids_BT.shape
    place_BT = torch.arange(rows * length, device=ids_BT.device).view(rows, length)
    given = {"input_ids": ids_BT, "use_cache": False}
    before_Z = place_BT[:, :-1].flatten()
    nats_Z, _ = _predicted(model, before_Z, ids_BT[:, 1:].flatten(), before_Z[:0], given)
    return nats_Z.view(rows, length - 1)


def _predicted(
    model: nn.Module, place_Z: Tensor, token_Z: Tensor, said_Y: Tensor, given: dict[str, Any]
) -> tuple[Float[Tensor, " Z"], Float[Tensor, "Y V"]]:
    """Return the nats of tokens that some places predict, and the logits of other places."""
    place_X, counts = torch.cat([place_Z, said_Y]), [len(place_Z), len(said_Y)]
    head = cast(nn.Module, model.get_output_embeddings())  # pyright: ignore[reportCallIssue]
    if type(head) is nn.Linear and _is_constant(head) and _HEAD_ENDS.get(model, True):
        hidden_XD, head_1V, logits_1V = _ended(model, place_X, given)
        if model not in _HEAD_ENDS:  # told once: it is the family's
            _HEAD_ENDS[model] = torch.equal(head_1V, logits_1V)
        if _HEAD_ENDS[model]:
            hidden_ZD, hidden_YD = hidden_XD.split(counts)
            return nats_of(hidden_ZD, head, token_Z), head(hidden_YD)
    # Two views: nothing as wide as the vocabulary is copied.
    logits_ZV, said_YV = _logits_at(model, place_X, given).split(counts)
    return fn.cross_entropy(logits_ZV.float(), token_Z, reduction="none"), said_YV


def _is_constant(head: nn.Linear) -> bool:
    """Whether an output embedding lies in memory (one on disk visits it during the pass) and does not learn."""
    learns = torch.is_grad_enabled() and head.weight.requires_grad
    return head.weight.device.type != "meta" and not learns


def _ended(
    model: nn.Module, place_X: Tensor, given: dict[str, Any]
) -> tuple[Float[Tensor, "X D"], Float[Tensor, "1 V"], Float[Tensor, "1 V"]]:
    """Return the last hidden states at some places, and of the first token what the head and the model make."""
    hidden: list[Tensor] = []
    ends: list[Tensor] = []

    def take(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden.append(args[0].flatten(0, 1).index_select(0, place_X))
        return (args[0][:1, :1].detach(), *args[1:])

    def told(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> None:
        ends.append(output)

    head = model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    hooks = (head.register_forward_pre_hook(take), head.register_forward_hook(told))  # pyright: ignore
    with Attachment(hooks):
        output = model(**given)
    return hidden[0], ends[0][0], output.logits[0]


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
