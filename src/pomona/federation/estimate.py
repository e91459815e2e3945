"""What a federation would send, keep, compute and hold in memory, from shapes alone."""

from collections.abc import Mapping
from dataclasses import dataclass

from pomona.evaluation.work import clock
from pomona.federation.cohort import FrozenBase
from pomona.federation.cost import cost_of
from pomona.federation.outline import OutlinedStep
from pomona.federation.update import ClientState


@dataclass(frozen=True)
class Memory:
    """Bytes of the base, of a cohort's trained tensors with all that AdamW has of them, of activations.

    Activations are what autograd keeps of a step whose rows are all as long as they may be and answers
    throughout; `checkpointed` is what it keeps with activation checkpointing. `working` is what the backward
    pass of a layer computes with: measured, up to half of what the layer keeps.
    """

    weights: int
    trained: int
    activations: int
    checkpointed: int
    working: int

    def peak(self, checkpointing: bool) -> int:
        """Return all of them together; what libraries take, and allocators hold back, comes on top."""
        return self.weights + self.training(checkpointing)

    def training(self, checkpointing: bool) -> int:
        """Return what a step takes beside the weights."""
        kept = self.checkpointed if checkpointing else self.activations
        return self.trained + kept + self.working


@dataclass(frozen=True)
class Traffic:
    """Bytes of the largest messages of a round, as they are serialised, and of all rounds together."""

    to_client: int
    from_client: int
    sent: int
    received: int


@dataclass(frozen=True)
class FederationEstimate:
    """What `pomona federate --dry-run` tells.

    `flops` and `everything` are those of `federation.cost`: per token the base's, the adapter's and the
    graft's; in bytes all parameters, and LoRA on the projections and every expert. `private` counts the
    parameters of one client's graft, personal LoRA and its own part of the adapter. `tokens` is an upper
    bound: all rows of all steps at full length.
    """

    total: int
    active: int
    clients: int
    rounds: int
    traffic: Traffic
    everything: Mapping[str, float]
    shared: int
    private: Mapping[str, int]
    flops: Mapping[str, float]
    memory: Memory
    tokens: int
    checkpointing: bool
    rate: float
    stated: bool

    @property
    def work(self) -> float:
        """Return the FLOPs of the whole training.

        Forward, with checkpointing twice, and backward through the frozen weights, which have no gradient
        of their own; what is trained has one.
        """
        added, again = self.flops["adapter"] + self.flops["graft"], int(self.checkpointing)
        return self.tokens * ((2 + again) * self.flops["base"] + (3 + again) * added)

    @property
    def seconds(self) -> float:
        """Return how long that takes at the rate."""
        return self.work / self.rate

    def __str__(self) -> str:
        return "\n".join((*self._sizes(), *self._shares(), *self._costs()))

    def _sizes(self) -> list[str]:
        return [
            f"{self.total:,} parameters, {self.active:,} active per token; {self.clients} clients, "
            f"{self.rounds} rounds"
        ]

    def _shares(self) -> list[str]:
        traffic, each = self.traffic, (self.traffic.to_client + self.traffic.from_client) / 2
        told = [
            f"shared: {self.shared:,} parameters, per client and round {_mb(traffic.to_client)} down and "
            f"{_mb(traffic.from_client)} up; all rounds {_mb(traffic.sent)} down and "
            f"{_mb(traffic.received)} up"
        ]
        if each:
            everywhere, whole = (
                self.everything[n] / each for n in ("lora_everywhere", "all_parameters")
            )
            told.append(
                f"aggregating everything: LoRA on all experts too {everywhere:.3g} times as much, all "
                f"weights {whole:.3g} times"
            )
        parts = [f"{name} {count:,}" for name, count in self.private.items() if count]
        told.append(f"private, per client: {', '.join(parts) or 'nothing'} parameters")
        return told

    def _costs(self) -> list[str]:
        base, adapter, graft = (self.flops[name] for name in ("base", "adapter", "graft"))
        memory = self.memory
        stated = "the rate given" if self.stated else "matrix products here"
        return [
            f"{base:,.0f} FLOPs per token of the base, {base + adapter:,.0f} with the adapter, "
            f"{base + adapter + graft:,.0f} with adapter and graft",
            f"training: at most {self.tokens:,} tokens, {self.work / 1e12:,.1f} TFLOPs, "
            f"{clock(self.seconds)} at {self.rate / 1e12:,.3g} TFLOP/s ({stated}); selection and "
            "evaluation come on top",
            f"memory: {_gib(memory.weights)} weights, {_gib(memory.trained)} trained tensors, gradients "
            f"and moments; activations at most {_gib(memory.activations)}, with checkpointing "
            f"{_gib(memory.checkpointed)}; {_gib(memory.working)} to compute with",
            f"peak {_gib(memory.peak(False))}, with checkpointing {_gib(memory.peak(True))} (the recipe "
            f"has it {'on' if self.checkpointing else 'off'}); libraries and what the allocator holds back "
            "come on top",
        ]


def _mb(size: float) -> str:
    return f"{size / 1e6:.4g} MB" if size < 1e9 else f"{size / 1e9:,.2f} GB"


def _gib(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB"


def active_parameters(base: FrozenBase, step: OutlinedStep) -> int:
    """Return the parameters that a token meets: all but the experts it is not sent to."""
    total = sum(p.numel() for p in base.model.parameters())
    for site, active in zip(base.sites, step.active, strict=True):
        own = sum(p.numel() for p in site.experts.parameters() if len(p) == site.num_experts)
        total -= own // site.num_experts * (site.num_experts - active)
    return total


def counted(
    base: FrozenBase, state: ClientState, step: OutlinedStep
) -> Mapping[str, Mapping[str, float]]:
    """Return what `cost_of` counts for a client whose tokens have the outlined number of experts."""
    widest = max((site.num_experts for site in base.sites), default=0)
    counts = [[active] + [0] * (widest - 1) for active in step.active]
    return cost_of(base, [state], [{"counts": counts, "tokens": 1}] if base.sites else [])
