"""One loop over one stacked AdamW that equals C separate ones."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pomona.errors import PomonaError
from pomona.shapes import PerClient


@dataclass(frozen=True)
class AdamW:
    """Loshchilov & Hutter, "Decoupled Weight Decay Regularization", ICLR 2019.

    `clip` bounds each client's own gradient norm; 0 switches clipping off.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0

    def build(self, parameters: Sequence[Tensor]) -> torch.optim.AdamW:
        """Return torch's optimiser; it works element by element, so stacking changes nothing."""
        return torch.optim.AdamW(
            list(parameters),
            lr=0.0,
            betas=(self.beta1, self.beta2),
            eps=self.epsilon,
            weight_decay=self.weight_decay,
        )


def fit(
    parameters: Sequence[Tensor],
    losses: Callable[[int], PerClient],
    steps: int,
    rate: Callable[[int], float],
    optimiser: AdamW,
) -> Float[Tensor, "steps C"]:
    """Train stacked parameters [C, …] in place and return every client's loss at every step.

    `losses(step)` gives one loss per client; their sum is differentiated once. Raises `PomonaError`
    at the first loss that is not finite, naming the client's place in the cohort.
    """
    engine = optimiser.build(parameters)
    history: list[Tensor] = []
    for step in range(steps):
        for group in engine.param_groups:
            group["lr"] = rate(step)
        engine.zero_grad(set_to_none=True)
        loss_C = losses(step)
        if not bool(loss_C.isfinite().all()):
            culprit = int((~loss_C.isfinite()).nonzero()[0])
            raise PomonaError(
                f"the loss of client {culprit} of the cohort is not finite at step {step}; "
                "lower the learning rate or train in float32"
            )
        loss_C.sum().backward()
        if optimiser.clip > 0:
            clip_per_client(parameters, optimiser.clip)
        engine.step()
        history.append(loss_C.detach())
    return torch.stack(history)


def clip_per_client(parameters: Sequence[Tensor], limit: float) -> None:
    """Scale each client's gradient to a norm of at most `limit`; clients never touch each other."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    square_C = torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0)
    factor_C = (limit / (square_C.sqrt() + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factor_C.view(-1, *[1] * (gradient.ndim - 1)))
