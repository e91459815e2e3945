"""The one place that decides what leaves a client.

A client's state has two fields, so that privacy is a matter of type: tensors in `graft` have no way
into `Update.shared`, whatever they are called and whatever a strategy asks for.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Shares = Literal["adapter", "nothing"]


@dataclass(frozen=True)
class ClientState:
    """All that a client trains.

    `adapter` is LoRA on the attention, `graft` the private experts and their gates; both map tensor
    names to values, [C, …] when stacked for a cohort.
    """

    adapter: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    graft: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])


@dataclass(frozen=True)
class Update:
    """What a client sends: the shared tensors and how many rows stand behind them."""

    client: str
    rows: int
    shared: Mapping[str, Tensor]


def split(state: ClientState, shares: Shares) -> tuple[dict[str, Tensor], ClientState]:
    """Return (shared, private). `join` puts them together again."""
    if shares == "nothing":
        return {}, state
    return dict(state.adapter), ClientState(graft=state.graft)


def join(shared: Mapping[str, Tensor], private: ClientState) -> ClientState:
    """Return the state whose `split` is (shared, private)."""
    return ClientState({**shared, **private.adapter}, private.graft)


def stack(states: Sequence[ClientState]) -> ClientState:
    """Return a cohort's state: every tensor gains a leading client dimension.

    Names come in order: sums over all tensors (a gradient's norm) must not depend on where a state
    has been, in memory or in a file.
    """
    return ClientState(
        {
            name: torch.stack([s.adapter[name] for s in states])
            for name in sorted(states[0].adapter)
        },
        {name: torch.stack([s.graft[name] for s in states]) for name in sorted(states[0].graft)},
    )


def unstack(state: ClientState, clients: int) -> list[ClientState]:
    """Return the states that `stack` joined, as tensors of their own."""

    def one(tensors: Mapping[str, Tensor], client: int) -> dict[str, Tensor]:
        return {name: value[client].detach().clone() for name, value in tensors.items()}

    return [ClientState(one(state.adapter, c), one(state.graft, c)) for c in range(clients)]
