"""One loop over one stacked AdamW that equals C separate ones."""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from pomona.errors import PomonaError
from pomona.shapes import PerClient


class NotFiniteError(PomonaError):
    """A loss or parameter of one client, by its place in the cohort, left the numbers at a step."""

    def __init__(self, client: int, step: int) -> None:
        super().__init__(
            f"training of client {client} of the cohort diverged at step {step}; lower the learning "
            "rate or train in float32"
        )
        self.client = client


@dataclass(frozen=True)
class AdamW:
    """Loshchilov & Hutter, "Decoupled Weight Decay Regularization", ICLR 2019.

    Attributes:
        beta1: Of the mean of gradients.
        beta2: Of the mean of their squares.
        epsilon: Added to the root of the squares.
        weight_decay: Share of a value that a step at learning rate 1 takes off.
        clip: Bounds each client's own gradient norm; 0 switches clipping off.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise PomonaError(f"{name} {getattr(self, name)} is not between 0 and 1")
        for name in ("epsilon", "weight_decay", "clip"):
            if not getattr(self, name) >= 0:
                raise PomonaError(f"{name} {getattr(self, name)} is negative; use 0 or more")

    def build(self, parameters: Sequence[Tensor]) -> torch.optim.AdamW:
        """Return torch's optimiser; it works element by element, so stacking changes nothing."""
        return torch.optim.AdamW(
            list(parameters),
            lr=0.0,
            betas=(self.beta1, self.beta2),
            eps=self.epsilon,
            weight_decay=self.weight_decay,
        )


@dataclass(frozen=True)
class Moments:
    """What AdamW remembers after `step` steps, in the order of the parameters."""

    step: int
    first: Sequence[Tensor] = field(repr=False)
    second: Sequence[Tensor] = field(repr=False)


def fit(
    parameters: Sequence[Tensor],
    losses: Callable[[int], PerClient],
    steps: int,
    rate: Callable[[int], float],
    optimiser: AdamW,
    accumulate: int = 1,
    resume: Moments | None = None,
    after: Callable[[Moments, PerClient], None] | None = None,
    factors: Sequence[float] = (),
) -> Float[Tensor, "steps C"]:
    """Train stacked parameters [C, …] in place and return every client's loss at every step.

    `losses(i)` gives one loss per client for the i-th batch; their sum is differentiated once, and
    `accumulate` batches make a step. With `resume` training goes on where those moments were taken:
    the parameters have to be those of that step. `after` sees the moments and losses of every step. `factors`
    are those of each client's learning rate (none: all 1).
    Raises `NotFiniteError` for the first client whose loss, or parameters at the end, are not finite.
    """
    engine = optimiser.build(parameters)
    if resume is not None:
        _restore(engine, parameters, resume)
    history: list[Tensor] = []
    for step in range(resume.step if resume else 0, steps):
        for group in engine.param_groups:
            group["lr"] = rate(step)
        engine.zero_grad(set_to_none=True)
        loss_C = sum_of_steps(losses, step, accumulate)
        if optimiser.clip > 0:
            clip_per_client(parameters, optimiser.clip)
        with _at_rates(parameters, factors):
            engine.step()
        history.append(loss_C)
        if after is not None:
            after(_moments(engine, parameters, step + 1), loss_C)
    for parameter in parameters:
        good_C = _rows(parameter.detach()).isfinite().all(dim=1)
        if not bool(good_C.all()):
            raise NotFiniteError(int((~good_C).nonzero()[0]), steps - 1)
    return torch.stack(history) if history else torch.zeros(0, 1)


@contextmanager
def _at_rates(parameters: Sequence[Tensor], factors: Sequence[float]) -> Generator[None]:
    """Scale what a step changes by each client's factor: AdamW's changes are in proportion to its rate."""
    if all(factor == 1 for factor in factors):
        yield
        return
    before = [parameter.detach().clone() for parameter in parameters]
    yield
    for parameter, old in zip(parameters, before, strict=True):
        factor_C = parameter.new_tensor(factors).view(-1, *[1] * (parameter.ndim - 1))
        parameter.data.copy_(old + factor_C * (parameter.data - old))


def sum_of_steps(losses: Callable[[int], PerClient], step: int, accumulate: int) -> PerClient:
    """Differentiate the mean loss of a step's batches and return it, one value per client."""
    total: Tensor | None = None
    for part in range(accumulate):
        loss_C = losses(step * accumulate + part) / accumulate
        if not bool(loss_C.isfinite().all()):
            raise NotFiniteError(int((~loss_C.isfinite()).nonzero()[0]), step)
        loss_C.sum().backward()
        total = loss_C.detach() if total is None else total + loss_C.detach()
    assert total is not None
    return total


def _moments(engine: torch.optim.AdamW, parameters: Sequence[Tensor], step: int) -> Moments:
    return Moments(
        step,
        [engine.state[p]["exp_avg"] for p in parameters],
        [engine.state[p]["exp_avg_sq"] for p in parameters],
    )


def _restore(engine: torch.optim.AdamW, parameters: Sequence[Tensor], moments: Moments) -> None:
    for parameter, first, second in zip(parameters, moments.first, moments.second, strict=True):
        engine.state[parameter] = {
            "step": torch.tensor(float(moments.step)),
            "exp_avg": first.to(parameter.device, copy=True),
            "exp_avg_sq": second.to(parameter.device, copy=True),
        }


def clip_per_client(parameters: Sequence[Tensor], limit: float) -> None:
    """Scale each client's gradient to a norm of at most `limit`; clients never touch each other."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    square_C = torch.stack([_rows(g).square().sum(1) for g in gradients]).sum(0)
    factor_C = (limit / (square_C.sqrt() + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factor_C.view(-1, *[1] * (gradient.ndim - 1)))


def _rows(stacked: Tensor) -> Float[Tensor, "C X"]:
    """One row per client; a scalar per client [C] (a gate's bias) is a row of one."""
    return stacked.reshape(len(stacked), -1)
