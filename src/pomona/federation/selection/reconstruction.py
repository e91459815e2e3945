"""The expert that alone comes closest to the routed output of its layer.

Lu et al., "Not All Experts are Equal", ACL 2024 (section 3); FLEx (arXiv 2506.00965) uses it for the
graft: e* = argmin_e Σ_batches ‖F(X) − E_e(X)‖_F, layers independent, F without the shared expert.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pomona.data.examples import Batch
from pomona.errors import PomonaError
from pomona.models.attachment import Attachment
from pomona.models.experts import ExpertSite


@dataclass(frozen=True)
class Reconstruction:
    """One forward pass of the unmodified model; nothing but E sums per layer is kept.

    `rows` caps the calibration rows of a client; FLEx uses 128.
    """

    rows: int = 128

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise PomonaError(f"selection rows {self.rows} is not positive; use for example 128")

    def __call__(
        self, model: nn.Module, sites: Sequence[ExpertSite], batches: Sequence[Batch], seed: int
    ) -> list[int]:
        """Return the index of the best expert of every site."""
        return [int(loss_E.argmin()) for loss_E in self.losses(model, sites, batches)]

    def losses(
        self, model: nn.Module, sites: Sequence[ExpertSite], batches: Sequence[Batch]
    ) -> list[Tensor]:
        """Return Σ_batches ‖F(X) − E_e(X)‖_F for every site, [E] each, in float64."""
        sums = [torch.zeros(site.num_experts, dtype=torch.float64) for site in sites]
        left = self.rows
        for batch in batches:
            rows = slice(0, left)
            token_mask_N = batch.attention_mask_BT[rows].bool().flatten()
            hooks = [
                site.experts.register_forward_hook(
                    _accumulate(site, token_mask_N, loss_E), with_kwargs=True
                )
                for site, loss_E in zip(sites, sums, strict=True)
            ]
            with Attachment(tuple(hooks)), torch.no_grad():
                model(
                    input_ids=batch.input_ids_BT[rows],
                    attention_mask=batch.attention_mask_BT[rows],
                    use_cache=False,
                    logits_to_keep=1,
                )
            left -= len(batch.input_ids_BT[rows])
            if left <= 0:
                break
        return sums


def _accumulate(site: ExpertSite, token_mask_N: Tensor, loss_E: Tensor) -> Callable[..., None]:
    def hook(
        _module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor
    ) -> None:
        x_ND = (args[0] if args else kwargs["hidden_states"])[token_mask_N]
        routed_ND = output[token_mask_N]
        for expert in range(site.num_experts):
            own_ND = site.down(site.activate(*site.gate_up(x_ND, expert)), expert)
            loss_E[expert] += torch.linalg.vector_norm((routed_ND - own_ND).float()).double().cpu()

    return hook
