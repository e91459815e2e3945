"""Rows of several lengths in one pass without padding, and without attention from row to row.

The rows' tokens stand one after another as a single row [1, N], so that every projection and every expert
computes real tokens only. Attention alone puts rows of like length side by side again.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from pomona.models.attachment import Attachment
from pomona.models.experts import expert_sites_if_any
from pomona.models.placement import device_of
from pomona.models.routing import experts_call
from pomona.models.split import Present, Ragged

ATTENTION = "packed_sdpa"
_ALIKE = 0.8  # rows side by side are at least so long, as a share of the longest
_CLOSE = {torch.float32: 1e-3, torch.float64: 1e-6}  # relative error of a token's last hidden state
_CLOSE_ROUNDED = 0.1  # of types that round more


@dataclass(frozen=True)
class Packing:
    """Where the rows of a packed pass lie, and whose they are.

    `shapes` are (rows, length) of groups of rows of like length; place_N is where each token lies in these
    groups, padded and one after another.
    """

    split: Ragged = field(repr=False)
    position_N: Int[Tensor, " N"] = field(repr=False)
    shapes: tuple[tuple[int, int], ...]
    place_N: Int[Tensor, " N"] = field(repr=False)

    def to(self, device: torch.device) -> "Packing":
        """Return the same packing on a device."""
        split = Ragged(self.split.sizes, device)
        return Packing(split, self.position_N.to(device), self.shapes, self.place_N.to(device))

    def apart(self, packed_1HNI: Tensor) -> list[Tensor]:
        """Return heads' queries, keys or values as groups of rows, padded on the right [B, H, T, I]."""
        flat_NHI = packed_1HNI[0].transpose(0, 1)
        places = sum(rows * length for rows, length in self.shapes)
        padded = flat_NHI.new_zeros(places, *flat_NHI.shape[1:])
        parts = padded.index_copy(0, self.place_N, flat_NHI).split(
            [rows * length for rows, length in self.shapes]
        )
        return [
            part.unflatten(0, shape).transpose(1, 2)
            for part, shape in zip(parts, self.shapes, strict=True)
        ]

    def together(self, groups: Sequence[Tensor]) -> Tensor:
        """Return groups [B, T, H, I] as one packed row [1, N, H, I]."""
        flat = torch.cat([group.flatten(0, 1) for group in groups])
        return flat.index_select(0, self.place_N).unsqueeze(0)


def packing_of(lengths: Sequence[Sequence[int]], device: torch.device) -> Packing:
    """Return the packing of clients' rows, whose lengths are told client by client; not all may be empty."""
    flat = [length for own in lengths for length in own]
    starts = [sum(flat[:row]) for row in range(len(flat))]
    order = sorted((row for row in range(len(flat)) if flat[row]), key=lambda row: -flat[row])
    groups: list[list[int]] = []
    for row in order:
        if groups and flat[row] >= _ALIKE * flat[groups[-1][0]]:
            groups[-1].append(row)
        else:
            groups.append([row])
    place_N = torch.empty(sum(flat), dtype=torch.int64)
    begin = 0
    for group in groups:
        longest = flat[group[0]]
        for row in group:
            place_N[starts[row] : starts[row] + flat[row]] = torch.arange(begin, begin + flat[row])
            begin += longest
    return Packing(
        Ragged(tuple(map(sum, lengths)), device),
        torch.cat([torch.arange(length) for length in flat]).to(device),
        tuple((len(group), flat[group[0]]) for group in groups),
        place_N.to(device),
    )


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packing: Packing | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend within each row of a packed pass; without a packing, as transformers' SDPA does.

    Rows begin where their padded group does, and what follows a row is never seen by a causal model: there
    is no mask. Raises `ValueError` for a window that a row is longer than.
    """
    if packing is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    window, longest = options.get("sliding_window"), max(length for _, length in packing.shapes)
    if window is not None and window < longest:
        raise ValueError(f"a packed row has {longest} tokens, and attention a window of {window}")
    options["is_causal"] = True
    queries, keys, values = map(packing.apart, (query, key, value))
    attended = [
        sdpa_attention_forward(module, q, k, v, None, **options)[0]
        for q, k, v in zip(queries, keys, values, strict=True)
    ]
    return packing.together(attended), None


def packed_arguments(ids_N: Int[Tensor, " N"], packing: Packing) -> dict[str, Any]:
    """Return what a model is called with for one packed pass."""
    return {
        "input_ids": ids_N.unsqueeze(0),
        "position_ids": packing.position_N.unsqueeze(0),
        # A mask of four dimensions is taken as it is: none is built, and this one is not looked at.
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids_N.device),
        "packing": packing,
        "use_cache": False,
    }


def follow(model: nn.Module, present: Present) -> Attachment:
    """Tell what is hooked onto a model whose tokens are whose, from each call of it to the next."""

    def tell(_module: nn.Module, _args: Any, given: dict[str, Any]) -> None:
        packing = cast(Packing | None, given.get("packing"))
        present.split = None if packing is None else packing.split

    return Attachment((model.register_forward_pre_hook(tell, with_kwargs=True),))


@torch.no_grad()
def can_pack(model: PreTrainedModel, length: int) -> bool:
    """Make a model ready for packed passes of rows of up to `length` tokens, and tell if it is.

    A model of another attention than SDPA, of a window that is shorter than a row, or that mixes tokens in
    another way than by attention, is left as it was: two rows are computed before and after, packed and
    apart, and every token has to agree.
    """
    asked = cast(str, model.config.get_text_config()._attn_implementation)  # pyright: ignore[reportPrivateUsage]
    if asked not in ("sdpa", ATTENTION) or length < 2:
        return False
    AttentionInterface.register(ATTENTION, packed_attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    model.set_attn_implementation("sdpa")
    rows = _two_rows(model, length)
    before_ND = torch.cat([_hidden(model, row, _apart(row)) for row in rows])
    model.set_attn_implementation(ATTENTION)
    try:
        if all(_alike(found_ND, before_ND) for found_ND in _packed_and_apart(model, rows)):
            return True
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever a family does with arguments that it does not know
        pass
    model.set_attn_implementation("sdpa")
    return False


def _two_rows(model: PreTrainedModel, length: int) -> list[Int[Tensor, " T"]]:
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    sizes = [length, max(1, length // 2)]
    rows = [torch.randint(vocabulary, (size,), generator=generator) for size in sizes]
    return [row.to(device_of(model)) for row in rows]


def _packed_and_apart(model: PreTrainedModel, rows: Sequence[Tensor]) -> Iterator[Tensor]:
    packing = packing_of([[len(row)] for row in rows], rows[0].device)
    yield torch.cat([_hidden(model, row, _apart(row)) for row in rows])
    together_N = torch.cat(list(rows))
    yield _hidden(model, together_N, packed_arguments(together_N, packing))


def _apart(row_T: Tensor) -> dict[str, Any]:
    return {"input_ids": row_T.unsqueeze(0), "use_cache": False}


def _hidden(model: PreTrainedModel, ids_N: Tensor, given: dict[str, Any]) -> Float[Tensor, "N D"]:
    """Return what goes into the output embedding, every token sent to experts that its id alone decides.

    A router might choose otherwise for a rounding error, and a wrong result look like one.
    """
    found: list[Tensor] = []

    def take(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        found.append(args[0])
        return (args[0][:, :1], *args[1:])

    def send(_module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        x_ND, index_NK, weight_NK = experts_call(args, kwargs)
        places_K = torch.arange(index_NK.shape[1], device=index_NK.device)
        chosen_NK = (ids_N.to(index_NK.device).unsqueeze(1) + places_K) % experts[id(_module)]
        even_NK = torch.full_like(weight_NK, 1 / index_NK.shape[1])
        return (x_ND, chosen_NK.to(index_NK.dtype), even_NK), {}

    sites = expert_sites_if_any(model)
    experts = {id(site.experts): site.num_experts for site in sites}
    hooks = [site.experts.register_forward_pre_hook(send, with_kwargs=True) for site in sites]
    head = cast(nn.Module, model.get_output_embeddings())
    with Attachment((head.register_forward_pre_hook(take), *hooks)):
        model(**given)
    return found[0][0]


def _alike(found_ND: Tensor, expected_ND: Tensor) -> bool:
    """Tell whether every token is what it was, but for rounding."""
    apart_N = (found_ND - expected_ND).float().norm(dim=1)
    error_N = apart_N / expected_ND.float().norm(dim=1)
    return bool((error_N < _CLOSE.get(found_ND.dtype, _CLOSE_ROUNDED)).all())
