"""The experts whose training lowers the client's loss most, to first order.

A step of gradient descent at rate η on parameters θ lowers the loss by η ‖∂L/∂θ‖² (He et al.,
"Sensitivity-Aware Visual Parameter-Efficient Fine-Tuning", ICCV 2023, section 3.1). What a newborn graft
trains is LoRA with B = 0 and A uniform in ±1/√in, where only B has a gradient, ∂L/∂B = s · ∂L/∂W · Aᵀ, and
its expected squared norm is s² R / (3 in) · ‖∂L/∂W‖². Leaving out what all experts share, the utility is

    u_e = Σ_batches Σ_{W ∈ gate, up, down of e} ‖∂L_batch/∂W‖²_F / in(W)

for the mean answer loss L of a batch. The gate that a graft will have is not known, so the router's own
weights are taken: the gradient is that of the resident expert's weights. It is computed from the layer's
input and from the gradient at its output, for one expert at a time; the weights themselves stay frozen.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pomona.data.examples import Batch
from pomona.federation.selection.passes import best, check_rows, first_rows
from pomona.models.attachment import Attachment
from pomona.models.experts import ExpertSite
from pomona.models.placement import device_of
from pomona.models.routing import experts_call
from pomona.training.loss import completion_losses


@dataclass(frozen=True)
class Gradient:
    """One forward and backward pass; memory is that of a training step on one batch.

    `rows` caps the calibration rows of a client.
    """

    rows: int = 128

    def __post_init__(self) -> None:
        check_rows(self.rows)

    def __call__(
        self,
        model: nn.Module,
        sites: Sequence[ExpertSite],
        batches: Sequence[Batch],
        seed: int,
        count: int,
    ) -> list[list[int]]:
        """Return the experts of highest utility of every site."""
        return [best(utility_E, count) for utility_E in self.utilities(model, sites, batches)]

    def utilities(
        self, model: nn.Module, sites: Sequence[ExpertSite], batches: Sequence[Batch]
    ) -> list[Tensor]:
        """Return u_e for every site, [E] each, in float64."""
        sums = [torch.zeros(site.num_experts, dtype=torch.float64) for site in sites]
        for batch in first_rows(batches, self.rows, device_of(model)):
            leaves: list[Tensor] = []
            hooks = [
                model.get_input_embeddings().register_forward_hook(_leaf(leaves)),  # pyright: ignore
                *(
                    site.experts.register_forward_hook(_watching(site, sum_E), with_kwargs=True)
                    for site, sum_E in zip(sites, sums, strict=True)
                ),
            ]
            with Attachment(tuple(hooks)), torch.enable_grad():
                loss = completion_losses(
                    model,
                    batch.input_ids_BT,
                    batch.attention_mask_BT,
                    batch.label_mask_BT,
                    clients=1,
                ).sum()
                torch.autograd.grad(loss, leaves)  # nothing is added to any parameter's gradient
        return sums


def _leaf(leaves: list[Tensor]) -> Callable[..., Tensor]:
    """Begin the graph at the embedded tokens: all parameters may be frozen."""

    def hook(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1]

    return hook


def _watching(site: ExpertSite, sum_E: Tensor) -> Callable[..., None]:
    """Wait for the gradient at a layer's output and add every expert's part."""

    def hook(
        _module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor
    ) -> None:
        x_ND, index_NK, weight_NK = (value.detach() for value in experts_call(args, kwargs))

        def add(pull_ND: Tensor) -> None:
            for expert in range(site.num_experts):
                token_n, slot_n = (index_NK == expert).nonzero(as_tuple=True)
                weight_n1 = weight_NK[token_n, slot_n].unsqueeze(1)
                own_nD = pull_ND[token_n] * weight_n1.to(pull_ND.dtype)
                sum_E[expert] += _utility(site, expert, x_ND[token_n], own_nD)

        output.register_hook(add)

    return hook


def _utility(site: ExpertSite, expert: int, x_ND: Tensor, pull_ND: Tensor) -> Tensor:
    """Return Σ_W ‖∂L/∂W‖² / in(W) of one expert from its tokens and the gradient at its output."""
    with torch.enable_grad():
        halves = site.halves(site.gate_up(x_ND, expert))
        gate_NW, up_NW = (half.detach().requires_grad_() for half in halves)
        inner_NW = site.activate(gate_NW, up_NW)
    pull_inner_NW = pull_ND @ site.expert(expert).down.detach()
    pulls = torch.autograd.grad(inner_NW, (gate_NW, up_NW), pull_inner_NW)
    parts = [(pulls[0], x_ND), (pulls[1], x_ND), (pull_ND, inner_NW.detach())]
    squares = [
        (pull.float().T @ into.float()).square().sum().double() / into.shape[1]
        for pull, into in parts
    ]
    return torch.stack(squares).sum().cpu()
