"""What a grafted expert computes: its weight for every token, times its output.

The private expert is the resident one plus what was trained, so the resident weights are used where
they lie and nothing is copied. With nothing trained yet its activation is the resident's bit for bit,
and the delta form's output is exactly zero.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from pomona.models.experts import ExpertSite
from pomona.models.gated import gated_pair
from pomona.models.split import Split, frozen_products
from pomona.shapes import Hidden, Routing, RoutingWeight


@dataclass(frozen=True)
class PrivateExpert:
    """One private expert per client of a cohort, at one site.

    `residents` are the experts that the C clients' grafts grew from, `tensors` what was trained,
    stacked [C, …]. `delta`: E_p(x) − E_e(x) is added, not E_p(x). `gate` "none" gives every token the
    weight one, "resident" the router's weight for the resident expert; otherwise it is σ(⟨w, x⟩ + b).
    """

    site: ExpertSite
    residents: tuple[int, ...]
    tensors: Mapping[str, Tensor] = field(repr=False)
    gate: str
    delta: bool
    scaling: float

    def __call__(
        self, x_ND: Hidden, index_NK: Routing, weight_NK: RoutingWeight, split: Split
    ) -> Hidden:
        """Return what is added to the layer's output; `split` tells whose token is whose."""
        weight_N = self.openness(x_ND, index_NK, weight_NK, split)
        return weight_N.unsqueeze(1) * self.output(x_ND, split)

    def openness(
        self, x_ND: Hidden, index_NK: Routing, weight_NK: RoutingWeight, split: Split
    ) -> Float[Tensor, " N"]:
        """Return every token's weight for its client's private expert."""
        if self.gate == "none":
            return x_ND.new_ones(len(x_ND), dtype=self._dtype)
        if self.gate == "resident":
            return self._router_weight(index_NK, weight_NK, split)
        return gate_value(x_ND, self.tensors, split)

    def output(self, x_ND: Hidden, split: Split) -> Hidden:
        """Return E_p(x) or, for the delta form, E_p(x) − E_e(x), of every token's own private expert.

        The delta needs one product with the resident `down` instead of two.
        """
        # Both activations in float32, as what is trained, or a bfloat16 base would round only one.
        both_NX = self._resident("gate_up_proj", x_ND, split).to(self._dtype)
        own_NW, through_NW = self._activations(both_NX, self._trained(x_ND, ("gate", "up"), split))
        down_ND = self._resident("down_proj", through_NW.to(x_ND.dtype), split, not self.delta)
        (more_ND,) = self._trained(own_NW, ("down",), split)
        return down_ND + more_ND

    def _activations(self, both_NX: Tensor, more: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the private expert's activation [N, W], and what of it goes through the resident `down`."""
        site = self.site
        if self.delta and site.plain:
            return gated_pair(both_NX, both_NX + torch.cat(list(more), dim=1))
        # Laid out alike: some kernels round strided values in another way, and birth would not be silent.
        gate_NW, up_NW = (half.contiguous() for half in site.halves(both_NX))
        own_NW = site.activate(gate_NW + more[0], up_NW + more[1])
        return own_NW, own_NW - site.activate(gate_NW, up_NW) if self.delta else own_NW

    @property
    def _dtype(self) -> torch.dtype:
        return next(value.dtype for value in self.tensors.values() if value.is_floating_point())

    def _router_weight(
        self, index_NK: Tensor, weight_NK: Tensor, split: Split
    ) -> Float[Tensor, " N"]:
        """The router's weight where a token is routed to the resident expert, zero elsewhere."""
        own_C = torch.tensor(self.residents, device=index_NK.device)
        own_N1 = own_C[split.client_N].unsqueeze(1)
        return torch.where(index_NK == own_N1, weight_NK.to(self._dtype), 0.0).sum(dim=1)

    def _trained(self, x_NI: Tensor, parts: Sequence[str], split: Split) -> Sequence[Tensor]:
        """Return what training adds to projections of the same input: scaling · B · A · x, or Δ · x + Δb."""
        x_NI = x_NI.to(self._dtype)
        if f"{parts[0]}.delta" in self.tensors:
            return [self._dense(x_NI, part, split) for part in parts]
        a_CRI = torch.cat([self.tensors[f"{part}.lora_A"] for part in parts], dim=1)
        into_NR = split.product(x_NI, a_CRI.mT) * self.scaling
        return [
            split.product(into, self.tensors[f"{part}.lora_B"].mT)
            for part, into in zip(parts, into_NR.chunk(len(parts), dim=1), strict=True)
        ]

    def _dense(self, x_NI: Tensor, part: str, split: Split) -> Tensor:
        change_NO = split.product(x_NI, self.tensors[f"{part}.delta"].mT)
        bias_CO = self.tensors.get(f"{part}.delta_bias")
        return change_NO if bias_CO is None else change_NO + bias_CO[split.client_N]

    def _resident(self, part: str, x_NI: Tensor, split: Split, bias: bool = True) -> Tensor:
        """Return a projection of each client's tokens by its own resident expert."""
        site = self.site
        found_NO = frozen_products(x_NI, [site.weight(part, e) for e in self.residents], split)
        biases = [site.bias(part, e) for e in self.residents] if bias else [None]
        if biases[0] is None:
            return found_NO
        return found_NO + torch.stack(cast(list[Tensor], biases))[split.client_N]


def gate_value(x_ND: Hidden, tensors: Mapping[str, Tensor], split: Split) -> Float[Tensor, " N"]:
    """Return σ(⟨w, x⟩ + b) of every token, for one private expert's tensors [C, …]."""
    gate_CD = tensors["gate"]
    logit_N = split.product(x_ND.to(gate_CD.dtype), gate_CD.unsqueeze(2)).squeeze(1)
    if "gate_bias" in tensors:
        logit_N = logit_N + tensors["gate_bias"][split.client_N]
    return torch.sigmoid(logit_N)
