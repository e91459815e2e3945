"""One private expert with a sigmoid gate, grafted into every MoE layer.

FLEx (arXiv 2506.00965, section 3): the layer's output gains σ(⟨w, x⟩ + b) · E_p(x), where the
private expert E_p starts as a selected pretrained expert and is trained by LoRA. The copy costs no
memory: only the resident expert's index and the LoRA factors are kept, and the hook computes the copy
through the resident weights.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isfinite
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pomona.errors import PomonaError
from pomona.federation.selection import Selection
from pomona.federation.selection.reconstruction import Reconstruction
from pomona.models.attachment import Attachment
from pomona.models.experts import ExpertSite
from pomona.models.lora import low_rank, low_rank_pair

GraftForm = Literal["delta", "copy"]
GateStart = Literal["router", "zero"]


@dataclass(frozen=True)
class Graft:
    """How a private expert is born and trained.

    `form` "delta" adds σ(g) · (E_p(x) − E_e(x)): the grafted model equals the base exactly until
    training moves it, and it exports as one gated expert of twice the width. "copy" adds σ(g) · E_p(x)
    as published: the model jumps at birth. `gate` says where w starts: the selected expert's router
    row ("router", as published) or zero. `bias` trains b too; without it the gate is what Qwen2-MoE's
    shared expert has.
    """

    selection: Selection = field(default_factory=Reconstruction)
    form: GraftForm = "delta"
    gate: GateStart = "router"
    bias: bool = False
    rank: int = 8
    alpha: float = 16.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise PomonaError(f"graft rank {self.rank} is not positive; use 1 or more")
        if not isfinite(self.alpha):
            raise PomonaError(f"graft alpha {self.alpha} is not finite; use for example 16")
        for name, kinds in (("form", GraftForm), ("gate", GateStart)):
            if getattr(self, name) not in get_args(kinds):
                known = ", ".join(get_args(kinds))
                raise PomonaError(
                    f'graft {name} "{getattr(self, name)}" is unknown; use one of {known}'
                )

    @property
    def scaling(self) -> float:
        """The factor alpha / rank in front of every B · A."""
        return self.alpha / self.rank


def init_graft(
    sites: Sequence[ExpertSite], graft: Graft, experts: Sequence[int], generator: torch.Generator
) -> dict[str, Tensor]:
    """Return one client's private tensors; `experts` holds the chosen expert of every site.

    Per site NAME: `NAME.expert` (int64 scalar), `NAME.gate` [D], with a bias `NAME.gate_bias` [], and
    LoRA pairs `NAME.{gate,up,down}.lora_{A,B}`; float32.
    """
    tensors: dict[str, Tensor] = {}
    for site, expert in zip(sites, experts, strict=True):
        row_D = site.router_row(expert) if graft.gate == "router" else None
        own = {
            "expert": torch.tensor(expert),
            "gate": torch.zeros(site.hidden_size)
            if row_D is None
            else row_D.detach().float().cpu().clone(),
        }
        if graft.bias:
            own["gate_bias"] = torch.zeros(())
        for part, (size_in, size_out) in _sizes(site).items():
            pair = low_rank_pair(size_in, size_out, graft.rank, generator)
            own |= {f"{part}.{factor}": value for factor, value in pair.items()}
        tensors |= {f"{site.name}.{name}": value for name, value in own.items()}
    return tensors


def _sizes(site: ExpertSite) -> dict[str, tuple[int, int]]:
    inner, outer = site.width, site.hidden_size
    return {"gate": (outer, inner), "up": (outer, inner), "down": (inner, outer)}


def attach_graft(
    sites: Sequence[ExpertSite], graft: Graft, tensors: Mapping[str, Tensor]
) -> Attachment:
    """Hook stacked grafts [C, …] onto their sites; rows of a batch are client-major.

    The hook sits on the fused experts module, whose signature is the same in every family, so that
    no parameter is renamed and `save_pretrained`, `generate` and activation checkpointing go on
    working.
    """
    handles = [
        site.experts.register_forward_hook(
            _hook(site, graft, _of_site(site, tensors)), with_kwargs=True
        )
        for site in sites
    ]
    return Attachment(tuple(handles))


def selected_experts(sites: Sequence[ExpertSite], tensors: Mapping[str, Tensor]) -> list[int]:
    """Return the resident expert that one client's graft grew from, per site."""
    return [int(tensors[f"{site.name}.expert"]) for site in sites]


def _of_site(site: ExpertSite, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefix = f"{site.name}."
    return {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}


def _hook(site: ExpertSite, graft: Graft, tensors: Mapping[str, Tensor]) -> Callable[..., Tensor]:
    experts = [int(index) for index in tensors["expert"]]

    def hook(
        _module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor
    ) -> Tensor:
        x_ND = args[0] if args else kwargs["hidden_states"]
        x_CSD = x_ND.reshape(len(experts), -1, site.hidden_size)
        open_CS = gate_value(x_CSD, tensors)
        added_CSD = open_CS.unsqueeze(2) * _private_expert(site, graft, experts, x_CSD, tensors)
        return output + added_CSD.reshape(output.shape).to(output.dtype)

    return hook


def gate_value(
    x_CSD: Float[Tensor, "C S D"], tensors: Mapping[str, Tensor]
) -> Float[Tensor, "C S"]:
    """Return σ(⟨w, x⟩ + b) of every token, for one site's tensors [C, …]."""
    gate_CD = tensors["gate"]
    logit_CS = (x_CSD.to(gate_CD.dtype) @ gate_CD.unsqueeze(2)).squeeze(2)
    if "gate_bias" in tensors:
        logit_CS = logit_CS + tensors["gate_bias"].unsqueeze(1)
    return torch.sigmoid(logit_CS)


def _private_expert(
    site: ExpertSite,
    graft: Graft,
    experts: Sequence[int],
    x_CSD: Float[Tensor, "C S D"],
    tensors: Mapping[str, Tensor],
) -> Float[Tensor, "C S D"]:
    """Return E_p(x) or, for the delta form, E_p(x) − E_e(x), of every client's own expert.

    With B = 0 the private expert's activation is the resident's bit for bit, so that the delta is
    exactly zero; it also needs one product with `down` instead of two.
    """

    def update(x_CSI: Tensor, part: str) -> Tensor:
        pair = tensors[f"{part}.lora_A"], tensors[f"{part}.lora_B"]
        return low_rank(x_CSI, *pair) * graft.scaling

    both_CSW = _through(experts, lambda x, e: torch.cat(site.gate_up(x, e), dim=-1), x_CSD)
    # Both activations in the graft's own dtype, or a bfloat16 base would round only one of them.
    gate_CSW, up_CSW = both_CSW.to(tensors["gate"].dtype).chunk(2, dim=-1)
    own_CSW = site.activate(gate_CSW + update(x_CSD, "gate"), up_CSW + update(x_CSD, "up"))
    delta = graft.form == "delta"
    through_CSW = own_CSW - site.activate(gate_CSW, up_CSW) if delta else own_CSW
    down = _through(
        experts, lambda h, e: site.down(h.to(x_CSD.dtype), e, bias=not delta), through_CSW
    )
    return down + update(own_CSW, "down")


def _through(
    experts: Sequence[int], expert: Callable[[Tensor, int], Tensor], x_CSI: Tensor
) -> Tensor:
    """Send each client's tokens through its own resident expert, one product per expert in use.

    Clients with the same expert share a product, and no weight is gathered or copied.
    """
    distinct = sorted(set(experts))
    if len(distinct) == 1:
        return expert(x_CSI.flatten(0, 1), distinct[0]).unflatten(0, x_CSI.shape[:2])
    clients = [[c for c, e in enumerate(experts) if e == one] for one in distinct]
    outputs = [
        expert(x_CSI[members].flatten(0, 1), one).unflatten(0, (len(members), x_CSI.shape[1]))
        for one, members in zip(distinct, clients, strict=True)
    ]
    place = sorted(range(len(experts)), key=[c for group in clients for c in group].__getitem__)
    return torch.cat(outputs)[place]


@contextmanager
def measure_gates(
    sites: Sequence[ExpertSite], tensors: Mapping[str, Tensor], mask_N: Tensor
) -> Generator[list[float]]:
    """Collect the mean gate openness σ per site over the masked tokens of one forward pass.

    `tensors` are one client's, without a client dimension. The list fills as layers run.
    """
    openness: list[float] = []

    def hook_of(own: Mapping[str, Tensor]) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            x_ND = (args[0] if args else kwargs["hidden_states"])[mask_N]
            stacked = {name: value.unsqueeze(0) for name, value in own.items()}
            openness.append(float(gate_value(x_ND.unsqueeze(0), stacked).mean()))

        return hook

    hooks = [
        site.experts.register_forward_pre_hook(hook_of(_of_site(site, tensors)), with_kwargs=True)
        for site in sites
    ]
    with Attachment(tuple(hooks)):
        yield openness
