"""FLoRA: the clients' updates are stacked, not averaged, and merged into what everybody starts from.

Wang et al., "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank
Adaptations", NeurIPS 2024. [w₁B₁ … w_nB_n] · [A₁; …; A_n] is the exact mean of the products; every round
begins with a new pair on top of it. Clients may have different ranks.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pomona.errors import PomonaError
from pomona.federation.strategies.protocol import ServerState
from pomona.federation.update import Part, Update
from pomona.models.lora import low_rank_pair

_ROUND = "round"


@dataclass(frozen=True)
class FLoRA:
    """Adds the weighted mean of B · A to `NAME.residual` and starts a new pair, the same for everybody."""

    @property
    def shares(self) -> Part:
        """The whole adapter."""
        return "adapter"

    def init(self, shared: Mapping[str, Tensor]) -> ServerState:
        """Return the newborn pairs with residuals of zero, or with what a warm start brings in them."""
        residuals = {
            f"{n}.residual": b.double() @ a.double() for n, (a, b) in _pairs(shared).items()
        }
        return _next(shared, residuals, 0)

    def aggregate(self, state: ServerState, updates: Iterable[Update]) -> ServerState:
        """Return the residuals moved and new pairs; without updates the state stays as it was."""
        rows, sums = 0, dict[str, Tensor]()
        for update in updates:
            rows += update.rows
            for name, (a_RI, b_OR) in _pairs(update.shared).items():
                product = update.rows * (b_OR.double() @ a_RI.double())
                sums[name] = sums[name] + product if name in sums else product
        if not rows:
            return state
        residuals = {
            f"{name}.residual": state.shared[f"{name}.residual"].double() + total / rows
            for name, total in sums.items()
        }
        return _next(state.shared, residuals, int(state.memory[_ROUND]) + 1)


def _pairs(shared: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    names = [name.removesuffix(".lora_A") for name in shared if name.endswith(".lora_A")]
    for name in names:
        if shared[f"{name}.lora_A"].ndim != 2:
            raise PomonaError(
                f"FLoRA keeps {name} whole at every client, which for experts is the model; leave "
                "adapter.experts out, or take flexlora"
            )
    return {name: (shared[f"{name}.lora_A"], shared[f"{name}.lora_B"]) for name in names}


def _next(
    shared: Mapping[str, Tensor], residuals: Mapping[str, Tensor], round_: int
) -> ServerState:
    """Return new pairs, a function of the round, on residuals."""
    generator = torch.Generator().manual_seed(round_)
    pairs: dict[str, Tensor] = {}
    for name, (a_RI, b_OR) in sorted(_pairs(shared).items()):
        new = low_rank_pair(a_RI.shape[1], len(b_OR), len(a_RI), generator)
        pairs |= {f"{name}.{factor}": value for factor, value in new.items()}
    first = round_ == 0 and all(not bool(r.any()) for r in residuals.values())
    kept = {n: shared[n] for n in pairs} if first else pairs
    whole = {name: value.float() for name, value in residuals.items()}
    return ServerState({**kept, **whole}, {_ROUND: torch.tensor(round_)})
