"""A mixture with private experts of its own: loads with `trust_remote_code=True`, without Pomona.

Written by `pomona export` (https://arxiv.org/abs/2506.00965, section 3): the output of every layer's experts
gains σ(⟨w, x⟩ + b) · FFN(x) for each private expert. A delta form is one FFN of twice the width, whose second
half takes away what the pretrained expert gives. config.json says in `private_experts` what stands where:
{"model.layers.0.mlp.experts": [{"width": 128, "gate": true, "bias": false}, …], …}.
"""

from typing import Any

import torch
from torch import nn


class PrivateExpert(nn.Module):
    """A gated FFN [D → width → D] with a sigmoid gate of its own, or none."""

    def __init__(self, hidden: int, width: int, gate: bool, bias: bool):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)
        self.gate = nn.Linear(hidden, 1, bias=bias) if gate else None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return what is added for every token [N, D]."""
        activated = nn.functional.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)
        added = self.down_proj(activated)
        return added if self.gate is None else torch.sigmoid(self.gate(hidden_states)) * added


def with_private_experts(base: Any) -> Any:
    """Return a subclass of a transformers model that reads private experts from its configuration."""

    class PersonalForCausalLM(base):
        """The model it is a subclass of, with private experts."""

        def __init__(self, config: Any):
            super().__init__(config)
            self.grafts = nn.ModuleList()  # names that no renaming of a family's own weights meets
            for name, grown in config.private_experts.items():
                own = nn.ModuleList(PrivateExpert(config.hidden_size, **one) for one in grown)
                self.grafts.append(own)
                self.get_submodule(name).register_forward_hook(_adding(own), with_kwargs=True)
            self.post_init()

    return PersonalForCausalLM


def _adding(own: nn.ModuleList) -> Any:
    def hook(_module: nn.Module, args: Any, kwargs: Any, output: torch.Tensor) -> torch.Tensor:
        hidden_states = args[0] if args else kwargs["hidden_states"]
        added = torch.stack([expert(hidden_states) for expert in own]).sum(0)
        return output + added.reshape(output.shape).to(output.dtype)

    return hook
