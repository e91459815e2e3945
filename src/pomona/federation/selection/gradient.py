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
from torch.nn import functional as fn

from pomona.data.examples import Batch
from pomona.federation.selection.passes import (
    Pass,
    best,
    check_rows,
    no_sums,
    shared_passes,
)
from pomona.models.attachment import Attachment
from pomona.models.experts import ExpertSite
from pomona.models.logits import labelled_logits
from pomona.models.placement import device_of
from pomona.models.routing import experts_call
from pomona.shapes import PerClient
from pomona.training.loss import client_means


@dataclass(frozen=True)
class Gradient:
    """One forward and backward pass; memory is that of a training step on one batch.

    Attributes:
        rows: At most so many calibration rows of a client.
    """

    rows: int = 128

    def __post_init__(self) -> None:
        check_rows(self.rows)

    def __call__(
        self,
        model: nn.Module,
        sites: Sequence[ExpertSite],
        clients: Sequence[Sequence[Batch]],
        seeds: Sequence[int],
        count: int,
    ) -> list[list[list[int]]]:
        """Return the experts of highest utility of every site."""
        utilities = self.utilities(model, sites, clients)
        return [[best(utility_E, count) for utility_E in own] for own in utilities]

    def utilities(
        self, model: nn.Module, sites: Sequence[ExpertSite], clients: Sequence[Sequence[Batch]]
    ) -> list[list[Tensor]]:
        """Return u_e of every client for every site, [E] each, in float64."""
        sums = no_sums(sites, clients)
        for one in shared_passes(clients, self.rows, device_of(model)):
            leaves: list[Tensor] = []
            hooks = [
                model.get_input_embeddings().register_forward_hook(_leaf(leaves)),  # pyright: ignore
                *(
                    site.experts.register_forward_hook(
                        _watching(site, one, [own[place] for own in sums]), with_kwargs=True
                    )
                    for place, site in enumerate(sites)
                ),
            ]
            with Attachment(tuple(hooks)), torch.enable_grad():
                # Clients' losses have no token in common: the gradient of their sum is each one's own,
                # and nothing is added to any parameter's.
                torch.autograd.grad(_losses(model, one).sum(), leaves)
        return sums


def _losses(model: nn.Module, one: Pass) -> PerClient:
    """Return the mean answer loss of each client of a pass."""
    batch = one.batch
    logits_ZV = labelled_logits(
        model, batch.input_ids_BT, batch.attention_mask_BT, batch.label_mask_BT
    )
    token_Z = batch.input_ids_BT[batch.label_mask_BT]
    nats_Z = fn.cross_entropy(logits_ZV.float(), token_Z, reduction="none")
    sizes = torch.tensor(one.sizes, device=token_Z.device)
    client_B = torch.arange(len(sizes), device=token_Z.device).repeat_interleave(sizes)
    client_Z = client_B[batch.label_mask_BT.nonzero()[:, 0]]
    return client_means(nats_Z, client_Z, len(sizes))


def _leaf(leaves: list[Tensor]) -> Callable[..., Tensor]:
    """Begin the graph at the embedded tokens: all parameters may be frozen."""

    def hook(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1]

    return hook


def _watching(site: ExpertSite, one: Pass, sums: Sequence[Tensor]) -> Callable[..., None]:
    """Wait for the gradient at a layer's output and add every expert's part to its client's sum [E]."""

    def hook(
        _module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor
    ) -> None:
        x_ND, index_NK, weight_NK = (value.detach() for value in experts_call(args, kwargs))

        def add(pull_ND: Tensor) -> None:
            for client, own in one.each():
                for expert in range(site.num_experts):
                    token_n, slot_n = (index_NK[own] == expert).nonzero(as_tuple=True)
                    weight_n1 = weight_NK[own][token_n, slot_n].unsqueeze(1)
                    own_nD = pull_ND[own][token_n] * weight_n1.to(pull_ND.dtype)
                    sums[client][expert] += _utility(site, expert, x_ND[own][token_n], own_nD)

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
