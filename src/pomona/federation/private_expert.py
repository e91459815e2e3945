"""What a grafted expert computes: its weight for every token, times its output.

The private expert is the resident one plus what was trained, so the resident weights are used where
they lie and nothing is copied. With nothing trained yet its activation is the resident's bit for bit,
and the delta form's output is exactly zero.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as fn

from pomona.models.experts import ExpertSite
from pomona.models.lora import low_rank
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
        self, x_ND: Hidden, index_NK: Routing, weight_NK: RoutingWeight
    ) -> Float[Tensor, "C S D"]:
        """Return what is added to the layer's output; rows are client-major."""
        weight_CS = self.openness(x_ND, index_NK, weight_NK)
        return weight_CS.unsqueeze(2) * self.output(self._per_client(x_ND))

    def openness(
        self, x_ND: Hidden, index_NK: Routing, weight_NK: RoutingWeight
    ) -> Float[Tensor, "C S"]:
        """Return every token's weight for its client's private expert."""
        x_CSD = self._per_client(x_ND)
        if self.gate == "none":
            return x_CSD.new_ones(x_CSD.shape[:2], dtype=self._dtype)
        if self.gate == "resident":
            return self._router_weight(self._per_client(index_NK), self._per_client(weight_NK))
        return gate_value(x_CSD, self.tensors)

    def output(self, x_CSD: Float[Tensor, "C S D"]) -> Float[Tensor, "C S D"]:
        """Return E_p(x) or, for the delta form, E_p(x) − E_e(x), of every client's own expert.

        The delta needs one product with the resident `down` instead of two.
        """
        site = self.site
        both_CSW = self._through(lambda x, e: torch.cat(site.gate_up(x, e), dim=-1), x_CSD)
        # Both activations in float32, as what is trained, or a bfloat16 base would round only one.
        gate_CSW, up_CSW = both_CSW.to(self._dtype).chunk(2, dim=-1)
        own_CSW = site.activate(
            gate_CSW + self._trained(x_CSD, "gate"), up_CSW + self._trained(x_CSD, "up")
        )
        through_CSW = own_CSW - site.activate(gate_CSW, up_CSW) if self.delta else own_CSW
        down_CSD = self._through(
            lambda h, e: site.down(h.to(x_CSD.dtype), e, bias=not self.delta), through_CSW
        )
        return down_CSD + self._trained(own_CSW, "down")

    @property
    def _dtype(self) -> torch.dtype:
        return next(value.dtype for value in self.tensors.values() if value.is_floating_point())

    def _per_client(self, value_NX: Tensor) -> Tensor:
        return value_NX.reshape(len(self.residents), -1, value_NX.shape[-1])

    def _router_weight(self, index_CSK: Tensor, weight_CSK: Tensor) -> Float[Tensor, "C S"]:
        """The router's weight where a token is routed to the resident expert, zero elsewhere."""
        own_C11 = torch.tensor(self.residents, device=index_CSK.device).view(-1, 1, 1)
        weight_CSK = weight_CSK.to(self._dtype)
        return torch.where(index_CSK == own_C11, weight_CSK, 0.0).sum(dim=2)

    def _trained(self, x_CSI: Tensor, part: str) -> Float[Tensor, "C S O"]:
        """Return what training adds to one projection: scaling · B · A · x, or Δ · x + Δb."""
        if f"{part}.delta" in self.tensors:
            return _dense(
                x_CSI, self.tensors[f"{part}.delta"], self.tensors.get(f"{part}.delta_bias")
            )
        pair = self.tensors[f"{part}.lora_A"], self.tensors[f"{part}.lora_B"]
        return low_rank(x_CSI, *pair) * self.scaling

    def _through(self, expert: Callable[[Tensor, int], Tensor], x_CSI: Tensor) -> Tensor:
        """Send each client's tokens through its own resident expert, one product per expert in use.

        Clients with the same expert share a product, and no weight is gathered or copied.
        """
        distinct = sorted(set(self.residents))
        if len(distinct) == 1:
            return expert(x_CSI.flatten(0, 1), distinct[0]).unflatten(0, x_CSI.shape[:2])
        clients = [[c for c, e in enumerate(self.residents) if e == one] for one in distinct]
        outputs = [
            expert(x_CSI[members].flatten(0, 1), one).unflatten(0, (len(members), x_CSI.shape[1]))
            for one, members in zip(distinct, clients, strict=True)
        ]
        order = [c for group in clients for c in group]
        place = sorted(range(len(order)), key=order.__getitem__)
        return torch.cat(outputs)[place]


def gate_value(
    x_CSD: Float[Tensor, "C S D"], tensors: Mapping[str, Tensor]
) -> Float[Tensor, "C S"]:
    """Return σ(⟨w, x⟩ + b) of every token, for one private expert's tensors [C, …]."""
    gate_CD = tensors["gate"]
    logit_CS = (x_CSD.to(gate_CD.dtype) @ gate_CD.unsqueeze(2)).squeeze(2)
    if "gate_bias" in tensors:
        logit_CS = logit_CS + tensors["gate_bias"].unsqueeze(1)
    return torch.sigmoid(logit_CS)


def _dense(
    x_CSI: Float[Tensor, "C S I"],
    delta_COI: Float[Tensor, "C O I"],
    bias_CO: Float[Tensor, "C O"] | None,
) -> Float[Tensor, "C S O"]:
    x_CSI = x_CSI.to(delta_COI.dtype)
    if len(delta_COI) == 1:  # a plain matrix product is faster
        return fn.linear(x_CSI, delta_COI[0], None if bias_CO is None else bias_CO[0])
    change_CSO = x_CSI @ delta_COI.mT
    return change_CSO if bias_CO is None else change_CSO + bias_CO.unsqueeze(1)
