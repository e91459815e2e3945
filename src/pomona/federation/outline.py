"""One step of training on a model without weights: how many experts a token has, what autograd keeps.

On the meta device every operation runs for its shapes alone, so this is the step itself with the adapters
and grafts hooked on, not a formula for it. Two operations have stand-ins, because their own code looks at
values or keeps what a fused kernel does not: the experts, and scaled dot-product attention.
"""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as fn
from torch.overrides import TorchFunctionMode

from pomona.federation.cohort import FrozenBase
from pomona.federation.update import ClientState
from pomona.models.attachment import Attachment
from pomona.models.expert_lora import PARTS, expert_change
from pomona.models.experts import ExpertSite, checkpointable_layers
from pomona.models.lora import find_tuned_experts
from pomona.models.routing import experts_call


@dataclass(frozen=True)
class OutlinedStep:
    """`active` are the experts per token of every site, `kept_bytes` what waits for the backward pass.

    With activation checkpointing `waiting_bytes` do, among them every layer's input, and at most
    `layer_bytes` of the layer that is computed again.
    """

    active: tuple[int, ...]
    kept_bytes: int
    waiting_bytes: int
    layer_bytes: int


def outlined_step(base: FrozenBase, state: ClientState, rows: int, length: int) -> OutlinedStep:
    """Run the forward pass of `rows` rows of `length` tokens, each of them one of an answer.

    `base` is of an outlined model, which is changed for good; `state` is a cohort's, stacked, on the meta
    device but for the experts' indices. What is kept is counted once per storage; parameters and the
    state itself are left out.
    """
    active: dict[str, int] = {}
    tuned = find_tuned_experts(base.model, base.lora)
    inside = {f"{site.name}.{part}" for site in tuned for part in PARTS}
    within = {n: v for n, v in state.adapter.items() if n.rpartition(".")[0] in inside}
    without = {n: v for n, v in state.adapter.items() if n not in within}
    for site in base.sites:
        own = within if site.name in {each.name for each in tuned} else {}
        site.experts.forward = _one_for_all(site, base.lora.scaling, own, active)
    attention = replace(base, lora=replace(base.lora, experts=False))
    known = [*base.model.parameters(), *base.model.buffers(), *_tensors(state)]
    kept = _Kept({id_of(value) for value in known})
    meta = torch.device("meta")
    ids_BT = torch.zeros(rows, length, dtype=torch.int64, device=meta)
    mask_BT = torch.ones(rows, 1, length, length, dtype=torch.bool, device=meta)
    with (
        attention.attach(replace(state, adapter=without)),
        _FusedAttention(),
        saved_tensors_hooks(kept.see, lambda value: value),
        _by_layer(base.model, kept) as layers,
    ):
        output = base.model(
            input_ids=ids_BT, attention_mask=mask_BT, position_ids=ids_BT[:1], use_cache=False
        )
        fn.cross_entropy(output.logits.flatten(0, 1).float(), ids_BT.flatten())
    own, inputs = (sum(each) for each in zip(*layers, strict=True)) if layers else (0, 0)
    return OutlinedStep(
        tuple(active[site.name] for site in base.sites),
        kept.bytes,
        kept.bytes - own + inputs,
        max((each for each, _ in layers), default=0),
    )


def id_of(value: Tensor) -> int:
    """Return what tells one storage from another, on any device."""
    return value.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]


def _tensors(state: ClientState) -> list[Tensor]:
    return [*state.adapter.values(), *state.graft.values(), *state.personal.values()]


class _Kept:
    """What autograd keeps, each storage once."""

    def __init__(self, known: set[int]) -> None:
        self._known, self._held = known, dict[int, Tensor]()

    def see(self, value: Tensor) -> Tensor:
        if id_of(value) not in self._known:
            self._held[id_of(value)] = value  # held, so that no other storage gets its number
        return value

    @property
    def bytes(self) -> int:
        return sum(value.untyped_storage().nbytes() for value in self._held.values())


@contextmanager
def _by_layer(model: nn.Module, kept: _Kept) -> Generator[list[tuple[int, int]]]:
    """Collect what every layer keeps and the bytes of its input."""
    found: list[tuple[int, int]] = []
    before: list[int] = []

    def enter(_layer: nn.Module, _args: Any) -> None:
        before.append(kept.bytes)

    def leave(_layer: nn.Module, args: tuple[Tensor, ...], _output: Any) -> None:
        found.append((kept.bytes - before.pop(), args[0].nbytes))

    layers = checkpointable_layers(model)
    handles = [layer.register_forward_pre_hook(enter) for layer in layers]
    handles += [layer.register_forward_hook(leave) for layer in layers]
    with Attachment(tuple(handles)):
        yield found


def _one_for_all(
    site: ExpertSite, scaling: float, adapter: Mapping[str, Tensor], active: dict[str, int]
) -> Callable[..., Tensor]:
    """Return a stand-in for fused experts that sends every token of every choice through the first.

    What is kept does not depend on which expert it is. `active` learns how many a token has.
    """
    pairs = {
        part: (
            adapter[f"{site.name}.{part}.lora_A"][:, 0],
            adapter[f"{site.name}.{part}.lora_B"][:, 0],
        )
        for part in (PARTS if adapter else ())
    }

    def forward(*args: Tensor, **kwargs: Tensor) -> Tensor:
        x_ND, index_NK, weight_NK = experts_call(args, kwargs)
        choices = active[site.name] = index_NK.shape[1]
        x_ZD = x_ND.repeat_interleave(choices, dim=0)
        weight_Z1 = weight_NK.reshape(-1, 1)
        weighted_ZD = site.apply(x_ZD, 0) * weight_Z1
        if pairs:
            token_Z = torch.zeros(len(x_ZD), dtype=torch.int64, device=x_ZD.device)
            change_ZD = expert_change(site, 0, scaling, pairs, x_ND[token_Z], token_Z)
            weighted_ZD = weighted_ZD + weight_Z1 * change_ZD
        return weighted_ZD.unflatten(0, index_NK.shape).sum(1).to(x_ND.dtype)

    return forward


class _FusedAttention(TorchFunctionMode):
    """Attention that keeps queries, keys, values, output and a sum per row, as every fused kernel does."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is fn.scaled_dot_product_attention:
            return _Attention.apply(*args[:3])
        return func(*args, **(kwargs or {}))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1]).float())
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError("an outline has no backward pass")
