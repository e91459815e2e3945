"""Server optimisers: the clients' mean is a step that the server takes with momentum or adaptively.

Hsu et al., "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
Classification", 2019 (FedAvgM); Reddi et al., "Adaptive Federated Optimization", ICLR 2021, algorithm 2
(FedAdagrad, FedAdam, FedYogi). The pseudo-gradient is Δ = mean − θ, the mean weighted by rows as in
FedAvg. What is remembered lies in `ServerState.memory`, so that an interrupted run goes on exactly.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from pomona.errors import PomonaError
from pomona.federation.strategies.fedavg import weighted_mean
from pomona.federation.strategies.protocol import ServerState
from pomona.federation.update import Part, Update

Second = Callable[[Tensor, Tensor], Tensor]
"""From the second moment v and Δ² to the new v, element by element."""


@dataclass(frozen=True)
class FedAvgM:
    """FedAvg with momentum: v ← β·v + Δ, θ ← θ + η·v.

    β = 0 and η = 1 is FedAvg bit for bit. FLEx compares with β = 0.9.

    Attributes:
        beta: Momentum β.
        learning_rate: The server's η.
    """

    beta: float = 0.9
    learning_rate: float = 1.0

    def __post_init__(self) -> None:
        _check_decay("FedAvgM", beta=self.beta)
        _check_positive("FedAvgM", learning_rate=self.learning_rate)

    @property
    def shares(self) -> Part:
        """The whole adapter."""
        return "adapter"

    def init(self, shared: Mapping[str, Tensor]) -> ServerState:
        """Remember a velocity of zero for every tensor."""
        return ServerState(
            shared, {f"velocity/{n}": v.new_zeros(v.shape) for n, v in shared.items()}
        )

    def aggregate(self, state: ServerState, updates: Iterable[Update]) -> ServerState:
        """Take one step; without updates the state stays as it was."""
        mean = weighted_mean(updates)
        if not mean:
            return state
        shared, memory = dict(state.shared), dict(state.memory)
        for name, value in mean.items():
            theta, velocity = state.shared[name].double(), state.memory[f"velocity/{name}"].double()
            delta = value.double() - theta
            moved = self.beta * velocity + delta
            memory[f"velocity/{name}"] = moved.to(value.dtype)
            # θ + η·v as mean + (η − 1)·Δ + η·β·v: θ + (mean − θ) would not be the mean exactly.
            step = (self.learning_rate - 1) * delta + self.learning_rate * self.beta * velocity
            shared[name] = (value.double() + step).to(value.dtype)
        return ServerState(shared, memory)


@dataclass(frozen=True)
class FedAdagrad:
    """Adagrad on the server: v ← v + Δ².

    The paper runs it without momentum (β₁ = 0), which is the default here.

    Attributes:
        learning_rate: The server's η.
        tau: τ, added to the root of v.
        beta1: Momentum β₁ of the step.
    """

    learning_rate: float = 1e-3
    tau: float = 1e-3
    beta1: float = 0.0

    def __post_init__(self) -> None:
        _check_decay("FedAdagrad", beta1=self.beta1)
        _check_positive("FedAdagrad", learning_rate=self.learning_rate, tau=self.tau)

    @property
    def shares(self) -> Part:
        """The whole adapter."""
        return "adapter"

    def init(self, shared: Mapping[str, Tensor]) -> ServerState:
        """Remember a first moment of zero and a second of τ²."""
        return _newborn(shared, self.tau)

    def aggregate(self, state: ServerState, updates: Iterable[Update]) -> ServerState:
        """Take one step; without updates the state stays as it was."""
        return _step(
            state, updates, self.learning_rate, self.tau, self.beta1, lambda v, square: v + square
        )


@dataclass(frozen=True)
class FedAdam:
    """Adam on the server: v ← β₂·v + (1 − β₂)·Δ²; no bias correction, as in the paper.

    Attributes:
        learning_rate: The server's η.
        tau: τ, added to the root of v.
        beta1: Momentum β₁ of the step.
        beta2: β₂ of the squares.
    """

    learning_rate: float = 1e-3
    tau: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.99

    def __post_init__(self) -> None:
        _check_decay("FedAdam", beta1=self.beta1, beta2=self.beta2)
        _check_positive("FedAdam", learning_rate=self.learning_rate, tau=self.tau)

    @property
    def shares(self) -> Part:
        """The whole adapter."""
        return "adapter"

    def init(self, shared: Mapping[str, Tensor]) -> ServerState:
        """Remember a first moment of zero and a second of τ²."""
        return _newborn(shared, self.tau)

    def aggregate(self, state: ServerState, updates: Iterable[Update]) -> ServerState:
        """Take one step; without updates the state stays as it was."""

        def second(v: Tensor, square: Tensor) -> Tensor:
            return self.beta2 * v + (1 - self.beta2) * square

        return _step(state, updates, self.learning_rate, self.tau, self.beta1, second)


@dataclass(frozen=True)
class FedYogi:
    """Yogi on the server: v ← v − (1 − β₂)·Δ²·sign(v − Δ²), which forgets slower than Adam.

    Attributes:
        learning_rate: The server's η.
        tau: τ, added to the root of v.
        beta1: Momentum β₁ of the step.
        beta2: β₂ of the squares.
    """

    learning_rate: float = 1e-3
    tau: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.99

    def __post_init__(self) -> None:
        _check_decay("FedYogi", beta1=self.beta1, beta2=self.beta2)
        _check_positive("FedYogi", learning_rate=self.learning_rate, tau=self.tau)

    @property
    def shares(self) -> Part:
        """The whole adapter."""
        return "adapter"

    def init(self, shared: Mapping[str, Tensor]) -> ServerState:
        """Remember a first moment of zero and a second of τ²."""
        return _newborn(shared, self.tau)

    def aggregate(self, state: ServerState, updates: Iterable[Update]) -> ServerState:
        """Take one step; without updates the state stays as it was."""

        def second(v: Tensor, square: Tensor) -> Tensor:
            return v - (1 - self.beta2) * square * (v - square).sign()

        return _step(state, updates, self.learning_rate, self.tau, self.beta1, second)


def _newborn(shared: Mapping[str, Tensor], tau: float) -> ServerState:
    """Return the state before the first round: m = 0, v = τ² (the algorithm asks for at least τ²)."""
    first = {f"first/{name}": value.new_zeros(value.shape) for name, value in shared.items()}
    second = {
        f"second/{name}": value.new_full(value.shape, tau**2) for name, value in shared.items()
    }
    return ServerState(shared, first | second)


def _step(
    state: ServerState,
    updates: Iterable[Update],
    learning_rate: float,
    tau: float,
    beta1: float,
    second: Second,
) -> ServerState:
    """Return m ← β₁·m + (1 − β₁)·Δ, v ← second(v, Δ²), θ ← θ + η·m / (√v + τ), in float64."""
    mean = weighted_mean(updates)
    if not mean:
        return state
    shared, memory = dict(state.shared), dict(state.memory)
    for name, value in mean.items():
        theta = state.shared[name].double()
        delta = value.double() - theta
        m = beta1 * state.memory[f"first/{name}"].double() + (1 - beta1) * delta
        v = second(state.memory[f"second/{name}"].double(), delta.square())
        memory[f"first/{name}"] = m.to(value.dtype)
        memory[f"second/{name}"] = v.to(value.dtype)
        shared[name] = (theta + learning_rate * m / (v.sqrt() + tau)).to(value.dtype)
    return ServerState(shared, memory)


def _check_decay(strategy: str, **values: float) -> None:
    for name, value in values.items():
        if not 0 <= value < 1:
            raise PomonaError(f"{strategy} {name} {value} is not in [0, 1); use for example 0.9")


def _check_positive(strategy: str, **values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise PomonaError(f"{strategy} {name} {value} is not positive; use more than 0")
