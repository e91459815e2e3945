"""Differential privacy of single rows in a client's own training: DP-SGD.

Abadi et al., "Deep Learning with Differential Privacy", CCS 2016, on everything that a client trains:
every row's gradient is clipped, their sum is noised, and the optimiser sees nothing else. The unit is one
row of one client; `pomona.federation.privacy` protects whole clients. docs/privacy.md says what this
protects and what it does not.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from pomona.errors import PomonaError
from pomona.federation.privacy import accounting, epsilon_of_samples, noise_key
from pomona.federation.selection import RandomExpert, SameExpert, Selection
from pomona.federation.update import ClientState
from pomona.seeds import torch_generator

_STEPS = "dp_sgd.steps"
_BLIND = (RandomExpert, SameExpert)


@dataclass(frozen=True)
class DPSGD:
    """Clips every row's gradient over all that is trained, and noises the sum.

    Attributes:
        clip: L2 norm of one row's gradient, at most.
        noise: Deviation of the Gaussian noise in units of `clip`.
        delta: ε of a row is told at this δ, which ought to be less than one divided by the number of a
            client's rows.
    """

    clip: float
    noise: float
    delta: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("clip", "noise"):
            if not 0 < getattr(self, name) < math.inf:
                raise PomonaError(
                    f"dp_sgd {name} {getattr(self, name)} is not positive; use for example 1.0, or "
                    "leave dp_sgd out"
                )
        if not 0 < self.delta < 1:
            raise PomonaError(
                f"dp_sgd delta {self.delta} is not between 0 and 1; use less than one divided by the "
                "number of a client's rows"
            )

    def check(self, selection: Selection | None) -> None:
        """Raise `PomonaError` for a selection that looks at rows, a bad key or no accountant."""
        if selection is not None and not isinstance(selection, _BLIND):
            raise PomonaError(
                f"{type(selection).__name__} chooses experts by looking at the rows without noise, which "
                'dp_sgd does not protect; use graft.selection "random" or "same"'
            )
        noise_key(0)
        accounting()


@dataclass(frozen=True)
class RowNoise:
    """The noise of clients' steps in a round, a function of (key, round, client, step).

    Steps are told from step `first` of the round on.
    """

    dp: DPSGD
    key: str = field(repr=False)
    round: int
    first: int = 0

    def mean(
        self,
        gradients: Mapping[str, Tensor],
        clients: Sequence[str],
        counts: Sequence[int],
        step: int,
    ) -> dict[str, Tensor]:
        """Return every client's noised mean gradient [C, …] of one step.

        `gradients` holds those of single rows, client-major [C·b, …]; `counts` says how many of each
        client's b rows are real, and the gradients of the others are zero.
        """
        sums = clipped_sums(gradients, self.dp.clip, len(clients))
        generators = [
            torch_generator(self.key, "dp-sgd", self.round, client, self.first + step)
            for client in clients
        ]
        deviation = self.dp.noise * self.dp.clip
        means: dict[str, Tensor] = {}
        for name, total in sums.items():  # their order decides which noise is whose
            noise = torch.stack(
                [torch.randn(total.shape[1:], generator=g, dtype=total.dtype) for g in generators]
            )
            rows_C = torch.tensor(counts, dtype=total.dtype, device=total.device)
            noised = total + deviation * noise.to(total.device)
            means[name] = (noised / _along(rows_C, noised)).to(gradients[name].dtype)
        return means


def clipped_sums(gradients: Mapping[str, Tensor], clip: float, clients: int) -> dict[str, Tensor]:
    """Return each client's sum [C, …] in float64 of rows' gradients [C·b, …] of norm `clip` at most."""
    square = torch.stack(
        [g.double().reshape(len(g), -1).square().sum(1) for g in gradients.values()]
    ).sum(0)
    factor = (clip / square.sqrt()).clamp(max=1.0)  # a gradient of zero has the factor one
    return {
        name: (g.double() * _along(factor, g)).unflatten(0, (clients, -1)).sum(1)
        for name, g in gradients.items()
    }


def _along(value: Tensor, stacked: Tensor) -> Tensor:
    """Return one value per row as a factor of what is stacked along the rows."""
    return value.view(-1, *[1] * (stacked.ndim - 1))


def repeated(state: ClientState, times: int) -> ClientState:
    """Return a stacked state [C, …] as that of C · `times` clients with a row each, leaves of their own."""

    def one(value: Tensor) -> Tensor:
        copies = value.detach().repeat_interleave(times, dim=0)
        return copies.requires_grad_(value.requires_grad)

    parts = {
        part.name: {n: one(v) for n, v in getattr(state, part.name).items()}
        for part in fields(ClientState)
        if part.name != "memory"
    }
    return ClientState(**parts)


def steps_of(memory: Mapping[str, Tensor]) -> int:
    """Return how many noised steps on its rows a client has taken in all rounds."""
    return int(memory.get(_STEPS, 0))


def with_steps(memory: Mapping[str, Tensor], steps: int) -> dict[str, Tensor]:
    """Return a client's memory after so many noised steps."""
    return {**memory, _STEPS: torch.tensor(steps)}


def row_epsilon(dp: DPSGD, rows: int, batch: int, steps: int) -> float:
    """Return ε at dp's delta of one row after `steps` batches of a client with so many rows.

    Every batch is a sample without replacement, independent of the others; neighbours have another row in
    the place of one, so that the sum moves by 2 · clip at most.
    """
    if steps == 0:
        return 0.0
    return epsilon_of_samples(dp.noise, dp.delta, {(min(batch, rows), rows): steps})
