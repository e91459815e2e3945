"""What of a frozen model learns: weights with low-rank updates, or float32 copies of whole weights.

Both are parametrisations of torch: the module's own forward sees the sum, autograd recomputes it under
activation checkpointing, and taking them off merges them. Parameters carry a leading dimension of one,
the cohort of the training loop.
"""

import math
from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from pomona.models.experts import ExpertSite
from pomona.reconstruction.retraining.settings import ExpertStage

_PARTS = ("gate_proj", "up_proj", "down_proj", "input_linear", "output_linear")


class LowRank(nn.Module):
    """W + (alpha / rank) · B · A of a weight [..., out, in]; A [1, ..., R, in], B [1, ..., out, R].

    Hu et al., "LoRA", ICLR 2022. Of a fused weight every expert has factors of its own.
    """

    def __init__(self, weight: Tensor, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        *lead, size_out, size_in = weight.shape
        bound = 1 / math.sqrt(size_in)
        a = torch.empty(1, *lead, rank, size_in).uniform_(-bound, bound, generator=generator)
        self.lora_a = nn.Parameter(a.to(weight.device))
        self.lora_b = nn.Parameter(torch.zeros(1, *lead, size_out, rank, device=weight.device))
        self.scaling = alpha / rank

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight with its update, in the weight's dtype."""
        return (weight + self.scaling * (self.lora_b[0] @ self.lora_a[0])).to(weight.dtype)


class Whole(nn.Module):
    """A float32 copy [1, ...] that replaces a weight, in units of `unit`, a power of two."""

    def __init__(self, weight: Tensor, unit: float = 1.0) -> None:
        super().__init__()
        self.copy = nn.Parameter(weight.detach().float().clone().unsqueeze(0) / unit)
        self.unit = unit

    def forward(self, weight: Tensor) -> Tensor:
        """Return the copy in the weight's dtype."""
        return (self.copy[0] * self.unit).to(weight.dtype)


def train_routers(sites: Sequence[ExpertSite], relative: bool) -> None:
    """Make every router's weight [E, D] learn.

    `relative`: in units of its root mean square, as large as AdamW's steps are anyway. The rows of a fitted
    router may be short, and steps of the experts' size would throw its choices about.
    """
    for site in sites:
        for module, name in _router_weights(site):
            weight = cast(Tensor, getattr(module, name))
            _put(module, name, Whole(weight, _size(weight) if relative else 1.0))


def _size(weight: Tensor) -> float:
    """Return the root mean square, rounded to a power of two so that units change no bit."""
    size = float(weight.detach().float().square().mean().sqrt())
    return 2.0 ** round(math.log2(size)) if size > 0 else 1.0


def train_experts(
    model: PreTrainedModel,
    sites: Sequence[ExpertSite],
    stage: ExpertStage,
    generator: torch.Generator,
) -> None:
    """Make experts (of a dense model: its FFNs), routers and norms learn, as a stage says."""
    if stage.experts != "none":
        for module, name in ffn_weights(model, sites):
            weight = cast(Tensor, getattr(module, name))
            how = (
                LowRank(weight, stage.rank, stage.alpha, generator)
                if stage.experts == "lora"
                else Whole(weight)
            )
            _put(module, name, how)
    if stage.router != "none":
        train_routers(sites, stage.router == "relative")
    if stage.norms:
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                _put(module, "weight", Whole(cast(Tensor, module.weight)))


def ffn_weights(model: PreTrainedModel, sites: Sequence[ExpertSite]) -> list[tuple[nn.Module, str]]:
    """Return every FFN weight: fused experts, shared experts and, in a dense model, plain FFNs."""
    found: list[tuple[nn.Module, str]] = [
        (site.experts, name) for site in sites for name in ("gate_up_proj", "down_proj")
    ]
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in _PARTS:
            found.append((module, "weight"))
    return found


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what learns, by name, in a fixed order."""
    return {name: p for name, p in sorted(model.named_parameters()) if p.requires_grad}


def merge(model: nn.Module) -> None:
    """Take the parametrisations off; what was learned becomes the weights."""
    for module in list(model.modules()):
        for name in list(getattr(module, "parametrizations", {})):
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)
            cast(Tensor, getattr(module, name)).requires_grad_(False)


def scale_routers(sites: Sequence[ExpertSite], factor: float) -> None:
    """Multiply every router's weight: how a temperature is folded in."""
    with torch.no_grad():
        for site in sites:
            for module, name in _router_weights(site):
                cast(Tensor, getattr(module, name)).mul_(factor)


def router_weights(sites: Sequence[ExpertSite]) -> list[Tensor]:
    """Return copies of the routers' weights."""
    return [
        cast(Tensor, getattr(module, name)).detach().clone()
        for site in sites
        for module, name in _router_weights(site)
    ]


def set_routers(sites: Sequence[ExpertSite], weights: Sequence[Tensor]) -> None:
    """Put back what `router_weights` returned."""
    places = [place for site in sites for place in _router_weights(site)]
    with torch.no_grad():
        for (module, name), weight in zip(places, weights, strict=True):
            cast(Tensor, getattr(module, name)).copy_(weight)


def _router_weights(site: ExpertSite) -> Iterator[tuple[nn.Module, str]]:
    if site.router is None:
        return
    for module in site.router.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.shape == (site.num_experts, site.hidden_size):
            yield module, "weight"
            return


def _put(module: nn.Module, name: str, how: nn.Module) -> None:
    parametrize.register_parametrization(module, name, how)
