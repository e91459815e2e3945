"""Everything one can say about retraining."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from pomona.errors import PomonaError
from pomona.training.loop import AdamW

Schedule = Literal["constant", "cosine"]
LossKind = Literal["distil", "cross-entropy"]
ExpertTraining = Literal["lora", "full", "none"]
RouterTraining = Literal["relative", "absolute", "none"]


def _check_rate(tokens: int, learning_rate: float) -> None:
    if tokens < 0:
        raise PomonaError(f"tokens {tokens} is negative; use 0 to leave the stage out")
    if not learning_rate > 0:
        raise PomonaError(f"learning_rate {learning_rate} is not positive; use for example 1e-3")


def _check_shares(warm_up: float, floor: float) -> None:
    if not (0 <= warm_up < 1 and 0 <= floor <= 1):
        raise PomonaError(
            f"warm_up {warm_up} and floor {floor} are to be shares between 0 and 1, warm_up below 1; "
            "use for example 0.03 and 0.1"
        )


def _check_choice(name: str, value: str, kinds: object) -> None:
    if value not in get_args(kinds):
        known = ", ".join(get_args(kinds))
        raise PomonaError(f'{name} "{value}" is unknown; use one of {known}')


@dataclass(frozen=True)
class RouterStage:
    """The router alone, every expert serving every token with weight softmax(logits / temperature).

    The temperature is folded into the router afterwards. DIVE takes 0.5 B tokens at a constant 1e-4 and
    temperature 0.05 (one active expert) or 0.5 (two).

    Attributes:
        tokens: Budget; 0 leaves the stage out.
        learning_rate: The highest.
        schedule: Of the learning rate.
        warm_up: Share of the steps in which the rate rises.
        floor: Share of the rate that a cosine ends at.
        temperature: Of the softmax.
    """

    tokens: int = 0
    learning_rate: float = 1e-3
    schedule: Schedule = "constant"
    warm_up: float = 0.0
    floor: float = 0.1
    temperature: float = 1.0

    def __post_init__(self) -> None:
        _check_rate(self.tokens, self.learning_rate)
        _check_shares(self.warm_up, self.floor)
        _check_choice("schedule", self.schedule, Schedule)
        if not self.temperature > 0:
            raise PomonaError(
                f"temperature {self.temperature} is not positive; use for example 0.5"
            )


@dataclass(frozen=True)
class ExpertStage:
    """Experts, router and norms, each token served by its active experts as in use.

    DIVE takes 5 B tokens, LoRA of rank 8, 1e-4 along a cosine with 3 % warm-up down to a tenth.

    Attributes:
        tokens: Budget; 0 leaves the stage out.
        learning_rate: The highest.
        schedule: Of the learning rate.
        warm_up: Share of the steps in which the rate rises.
        floor: Share of the rate that a cosine ends at.
        experts: Trained by LoRA (merged at the end), in full or not at all.
        rank: Of the LoRA.
        alpha: Of the LoRA.
        router: Trained in steps "relative" to the size of its weights, "absolute" ones as large as the
            experts' (as DIVE), or not at all.
        norms: Trained too.
    """

    tokens: int = 1_000_000
    learning_rate: float = 2e-3
    schedule: Schedule = "cosine"
    warm_up: float = 0.03
    floor: float = 0.1
    experts: ExpertTraining = "lora"
    rank: int = 8
    alpha: float = 16.0
    router: RouterTraining = "relative"
    norms: bool = True

    def __post_init__(self) -> None:
        _check_rate(self.tokens, self.learning_rate)
        _check_shares(self.warm_up, self.floor)
        _check_choice("schedule", self.schedule, Schedule)
        _check_choice("experts", self.experts, ExpertTraining)
        _check_choice("router", self.router, RouterTraining)
        if self.rank < 1:
            raise PomonaError(f"rank {self.rank} is not positive; use 1 or more")
        if not self.alpha > 0:
            raise PomonaError(
                f"alpha {self.alpha} is not positive; use for example {2 * self.rank}"
            )


@dataclass(frozen=True)
class Objective:
    """What is minimised beside the balance of experts.

    Attributes:
        loss: KL(dense ‖ mixture) per token ("distil"), or the text's cross-entropy.
        temperature: Softens both distributions of `distil`.
        balance: Weight of the load-balancing loss of Switch Transformers (Fedus et al., 2022).
        z: Weight of the router z-loss of ST-MoE (Zoph et al., 2022).
        straight_through: Give the router of a single active expert, whose weight is always one, the
            gradient of its probability.
    """

    loss: LossKind = "distil"
    temperature: float = 1.0
    balance: float = 0.01
    z: float = 0.001
    straight_through: bool = True

    def __post_init__(self) -> None:
        _check_choice("loss", self.loss, LossKind)
        if not self.temperature > 0 or self.balance < 0 or self.z < 0:
            raise PomonaError("temperature must be positive, balance and z not negative")


@dataclass(frozen=True)
class Retraining:
    """Two stages over windows of text.

    A stage takes as many whole steps as its tokens pay for; with 0 tokens there is no such stage.

    Attributes:
        router: The first stage.
        experts: The second stage.
        objective: What is minimised.
        length: Tokens of a window.
        batch: Windows per pass.
        accumulate: Passes per step.
        optimiser: AdamW's own settings.
        checkpointing: Recompute activations, and merge a layer's weights anew instead of keeping them.
        save_every: Steps between checkpoints.
        dtype: Of the frozen weights.
    """

    router: RouterStage = field(default_factory=RouterStage)
    experts: ExpertStage = field(default_factory=ExpertStage)
    objective: Objective = field(default_factory=Objective)
    length: int = 256
    batch: int = 8
    accumulate: int = 1
    optimiser: AdamW = field(default_factory=AdamW)
    checkpointing: bool = False
    save_every: int = 100
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        for name in ("batch", "accumulate", "save_every"):
            if getattr(self, name) < 1:
                raise PomonaError(f"{name} {getattr(self, name)} is not positive; use 1 or more")
        if self.length < 2:
            raise PomonaError(f"length {self.length} is too small; use 2 or more")
        for stage, tokens in (("router", self.router.tokens), ("experts", self.experts.tokens)):
            if 0 < tokens < self.step_tokens:
                raise PomonaError(
                    f"{stage}.tokens {tokens} is less than one step, {self.step_tokens} tokens "
                    f"({self.accumulate} · {self.batch} windows of {self.length}); give it at least "
                    "that or make length, batch or accumulate smaller"
                )

    @property
    def step_tokens(self) -> int:
        """Return how many tokens an optimiser step sees."""
        return self.length * self.batch * self.accumulate

    def steps(self, tokens: int) -> int:
        """Return how many optimiser steps a token budget pays for."""
        return tokens // self.step_tokens

    def seen(self) -> tuple[int, int]:
        """Return the tokens that the steps of the router's and the experts' stage see."""
        router, experts = self.steps(self.router.tokens), self.steps(self.experts.tokens)
        return router * self.step_tokens, experts * self.step_tokens
