"""The one place that decides what leaves a client.

A client's state has a field for what may be shared and fields for what never is, so that privacy is a
matter of type: tensors in `graft`, `personal` and `memory` have no way into `Update.shared`, whatever
they are called and whatever a strategy asks for.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Literal

import torch
from torch import Tensor

Part = Literal["adapter", "lora_A", "lora_B", "nothing"]


@dataclass(frozen=True)
class ClientState:
    """All that a client holds.

    `adapter` is the LoRA that a strategy may share, `graft` the private experts and their gates, `personal` a
    private LoRA beside the adapter, `memory` what a strategy or the optimiser keeps from round to round. All
    map tensor names to values, [C, …] when stacked for a cohort.
    """

    adapter: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    graft: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    personal: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    memory: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])

    @property
    def private(self) -> bool:
        """Whether there is anything that makes this client's model its own."""
        return bool(self.adapter or self.graft or self.personal)

    def to(self, device: torch.device) -> "ClientState":
        """Return the same state on a device; indices and counts, read as numbers, stay where they are."""

        def one(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {n: v.to(device) if v.is_floating_point() else v for n, v in tensors.items()}

        return ClientState(*(one(getattr(self, part.name)) for part in fields(ClientState)))


@dataclass(frozen=True)
class Update:
    """What a client sends: the shared tensors, how many rows stand behind them, their loss if asked.

    `wire` is what travels in the place of `shared`, where that is compressed.
    """

    client: str
    rows: int
    shared: Mapping[str, Tensor]
    loss: float | None = None
    wire: Mapping[str, Tensor] | None = None

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The tensors that travel."""
        return self.shared if self.wire is None else self.wire

    @property
    def message(self) -> dict[str, Tensor]:
        """The tensors that are serialised, with what is told beside them."""
        told = {} if self.loss is None else {"loss": torch.tensor(self.loss)}
        return {**self.tensors, **told}


def within(name: str, part: Part) -> bool:
    """Whether an adapter's tensor belongs to a part of it; residuals belong to the whole only."""
    return part == "adapter" or (part != "nothing" and name.endswith(part))


def learns(name: str, freezes: Part) -> bool:
    """Whether a client trains an adapter's tensor; what a server merged (`residual`) it never does."""
    return not (within(name, freezes) or name.endswith(".residual"))


def split(
    state: ClientState, shares: Part, freezes: Part = "nothing"
) -> tuple[dict[str, Tensor], ClientState]:
    """Return (what is sent, what stays). `join` puts them together with what the server holds.

    Of the shared part only what was trained is sent: the server has the rest.
    """
    adapter = state.adapter.items()
    sent = {n: v for n, v in adapter if within(n, shares) and learns(n, freezes)}
    own = {n: v for n, v in adapter if not within(n, shares)}
    return sent, ClientState(own, state.graft, state.personal, state.memory)


def join(shared: Mapping[str, Tensor], private: ClientState) -> ClientState:
    """Return the state of a client that was sent `shared`; its own tensors come before those."""
    adapter = {**shared, **private.adapter}
    return ClientState(adapter, private.graft, private.personal, private.memory)


def stack(states: Sequence[ClientState]) -> ClientState:
    """Return a cohort's state: every tensor gains a leading client dimension.

    Names come in order: sums over all tensors (a gradient's norm) must not depend on where a state
    has been, in memory or in a file.
    """

    def one(part: str) -> dict[str, Tensor]:
        first: Mapping[str, Tensor] = getattr(states[0], part)
        return {n: torch.stack([getattr(s, part)[n] for s in states]) for n in sorted(first)}

    return ClientState(*(one(part.name) for part in fields(ClientState)))


def unstack(state: ClientState, clients: int) -> list[ClientState]:
    """Return the states that `stack` joined, as tensors of their own."""

    def one(tensors: Mapping[str, Tensor], client: int) -> dict[str, Tensor]:
        return {name: value[client].detach().clone() for name, value in tensors.items()}

    parts = [getattr(state, part.name) for part in fields(ClientState)]
    return [ClientState(*(one(tensors, c) for tensors in parts)) for c in range(clients)]
