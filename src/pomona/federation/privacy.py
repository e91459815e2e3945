"""Differential privacy of what clients share: their updates are clipped, noised and accounted for.

Dwork & Roth, "The Algorithmic Foundations of Differential Privacy", 2014; McMahan et al., "Learning
Differentially Private Recurrent Language Models", ICLR 2018 (clipped updates, noise on their mean). The
unit is a client with all its rows. docs/privacy.md says what this protects and what it does not.
"""

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from pomona.errors import PomonaError
from pomona.federation.strategies import AVERAGING, Corrects, Hears, Strategy, only_averages
from pomona.federation.update import Update
from pomona.seeds import torch_generator

KEY = "POMONA_NOISE_KEY"
_Tensors = dict[str, Tensor]
Sample = tuple[int, int]
"""How many were sampled, of how many."""


@dataclass(frozen=True)
class Privacy:
    """Clips every client's update over all its tensors and adds Gaussian noise.

    Every client counts the same: a weight by rows would let one move the mean by more than its share, and
    tell its rows.

    Attributes:
        clip: L2 norm of a client's change, at most.
        noise: Deviation of the noise in units of `clip`.
        where: "central": the server adds noise · clip / n to the mean of n clients. "local": every client
            adds noise · clip to its own change.
        delta: ε is told at this δ.
        sampling: What an attacker knows of who took part: "known" (everything: no amplification), "fixed"
            (nothing, a fixed number is drawn), "poisson" (as if every client were drawn on its own, which
            the sampler does not do; for comparison with others' figures).
    """

    clip: float
    noise: float
    where: Literal["central", "local"] = "central"
    delta: float = 1e-5
    sampling: Literal["known", "fixed", "poisson"] = "known"

    def __post_init__(self) -> None:
        for name in ("clip", "noise"):
            if not 0 < getattr(self, name) < math.inf:
                raise PomonaError(
                    f"privacy {name} {getattr(self, name)} is not positive; use for example 1.0, or "
                    "leave [privacy] out"
                )
        if not 0 < self.delta < 1:
            raise PomonaError(
                f"privacy delta {self.delta} is not between 0 and 1; use less than one divided by the "
                "number of clients"
            )
        if self.where == "local" and self.sampling != "known":
            raise PomonaError(
                f'privacy sampling "{self.sampling}" does not go with where = "local": the server '
                'sees who sent what; use "known"'
            )

    def check(self, strategy: Strategy) -> None:
        """Raise `PomonaError` for a strategy that this cannot protect, a bad key or no accountant."""
        name = type(strategy).__name__
        if strategy.shares == "nothing":
            raise PomonaError(f"{name} shares nothing that [privacy] could protect; leave it out")
        if isinstance(strategy, Corrects | Hears):
            raise PomonaError(
                f"{name} sends more than its update, which [privacy] does not protect; leave one of them out"
            )
        if self.where == "central" and not only_averages(strategy):
            known = ", ".join(kind.__name__ for kind in AVERAGING)
            raise PomonaError(
                f"{name} looks at every update, but central privacy shows a strategy only their noised "
                f'mean; use privacy where = "local", or one of {known}'
            )
        noise_key(0)
        accounting()


def noise_key(seed: int | str) -> tuple[str, bool]:
    """Return what noise is drawn from, and whether it is a secret.

    The environment variable POMONA_NOISE_KEY if it is set: a recipe is copied into run folders and
    reports, so a secret has no place in it. Otherwise the recipe's seed: a simulation, which anybody
    who has the recipe can take the noise off again.
    """
    key = os.environ.get(KEY, "")
    if not key:
        return f"seed {seed}", False
    if len(key) < 16:
        raise PomonaError(f"{KEY} is too short to be a secret; give it 16 characters or more")
    return f"{key} {seed}", True


def protect(
    privacy: Privacy, sent: Mapping[str, Tensor], updates: Iterable[Update], key: str, round_: int
) -> Iterator[Update]:
    """Yield what the server may aggregate: every update clipped and noised, or one noised mean.

    `sent` is what the clients started from. Noise is a function of (key, round, client). Updates stream
    through, in the order of their clients' names; sums run in float64.
    """
    if privacy.where == "local":
        for update in updates:
            change = clipped(sent, update, privacy.clip)
            noised = _noised(change, privacy, 1, key, round_, update.client)
            yield Update(update.client, 1, _moved(sent, noised))
        return
    total: _Tensors = {}
    clients = 0
    for update in updates:
        clients += 1
        for name, change in clipped(sent, update, privacy.clip).items():
            total[name] = total[name] + change if name in total else change
    if clients:
        mean = {name: change / clients for name, change in total.items()}
        noised = _noised(mean, privacy, clients, key, round_, "the server")
        yield Update(f"mean of {clients} clients", 1, _moved(sent, noised))


def clipped(sent: Mapping[str, Tensor], update: Update, clip: float) -> _Tensors:
    """Return a client's change in float64, scaled so that its norm over all tensors is at most `clip`."""
    change: _Tensors = {}
    for name in sorted(update.shared):
        if name not in sent or update.shared[name].shape != sent[name].shape:
            raise PomonaError(
                f'client "{update.client}" sent {name} unlike what it was sent, so its change has no '
                "norm to clip; use a strategy that keeps names and shapes, or leave [privacy] out"
            )
        change[name] = update.shared[name].double() - sent[name].double()
    norm = torch.stack([value.square().sum() for value in change.values()]).sum().sqrt().item()
    if not math.isfinite(norm):
        raise PomonaError(
            f'client "{update.client}" sent values that are not finite; lower local.learning_rate'
        )
    factor = min(1.0, clip / norm) if norm > 0 else 1.0
    return {name: value * factor for name, value in change.items()}


def _noised(
    change: _Tensors, privacy: Privacy, clients: int, key: str, round_: int, client: str
) -> _Tensors:
    generator = torch_generator(key, "privacy", privacy.where, round_, client)
    deviation = privacy.noise * privacy.clip / clients
    return {
        name: value
        + deviation
        * torch.randn(value.shape, generator=generator, dtype=value.dtype).to(value.device)
        for name, value in change.items()
    }


def _moved(sent: Mapping[str, Tensor], change: _Tensors) -> _Tensors:
    return {name: (sent[name].double() + by).to(sent[name].dtype) for name, by in change.items()}


def epsilon(privacy: Privacy, rounds: Mapping[Sample, int]) -> float:
    """Return ε at the privacy's delta after `rounds`: how many there were of every (sampled, of).

    What neighbours are: central and "known", a client's change and none at all; "poisson", a client
    more or fewer; "fixed" and local, any change in place of another, which is twice as far. A client
    counts as one that could be sampled in every round where nobody knows better, so that ε holds for each.
    """
    if privacy.sampling == "fixed":
        return epsilon_of_samples(privacy.noise, privacy.delta, rounds)
    library = accounting()
    multiplier = privacy.noise / 2 if privacy.where == "local" else privacy.noise
    plain = _plain(multiplier, privacy.delta, sum(rounds.values()))
    if privacy.sampling == "known" or _whole(rounds):
        return plain
    # finer than ε / 100,000 costs memory and shows in no figure
    accountant = library.pld.PLDAccountant(value_discretization_interval=max(1e-4, plain / 1e5))
    gaussian = library.GaussianDpEvent(multiplier)
    for (sampled, of), times in rounds.items():
        accountant.compose(library.PoissonSampledDpEvent(sampled / of, gaussian), times)
    return min(plain, float(accountant.get_epsilon(privacy.delta)))


def epsilon_of_samples(noise: float, delta: float, times: Mapping[Sample, int]) -> float:
    """Return ε of noised sums over fixed-size samples without replacement, so many of every (sampled, of).

    Neighbours have one contribution in the place of another, which is twice as far as its norm: a noise
    of `noise` norms counts half. Wang, Balle & Kasiviswanathan, "Subsampled Rényi Differential Privacy",
    AISTATS 2019.
    """
    plain = _plain(noise / 2, delta, sum(times.values()))
    if _whole(times):
        return plain
    composed = [
        (orders, count * divergences)
        for sample, count in times.items()
        for orders, divergences in [_one_sample(noise / 2, *sample)]
    ]
    orders, divergences = composed[0][0], sum(of_sample for _, of_sample in composed)
    return min(plain, float(accounting().rdp.compute_epsilon(orders, divergences, delta)[0]))


def _whole(rounds: Mapping[Sample, int]) -> bool:
    return all(sampled == of for sampled, of in rounds)


@lru_cache(maxsize=1024)
def _one_sample(multiplier: float, sampled: int, of: int) -> tuple[Any, Any]:
    """Return Rényi orders and divergences of one sum; they add up, and take half a second to compute."""
    library = accounting()
    relation = library.NeighboringRelation.REPLACE_ONE
    accountant = library.rdp.RdpAccountant(neighboring_relation=relation)
    gaussian = library.GaussianDpEvent(multiplier)
    accountant.compose(library.SampledWithoutReplacementDpEvent(of, sampled, gaussian))
    return accountant.orders, accountant.rdp


def _plain(multiplier: float, delta: float, times: int) -> float:
    """Gaussian noise `times` times on the same data is one with less noise: σ / √times."""
    return float(accounting().get_epsilon_gaussian(multiplier / math.sqrt(times), delta))


def accounting() -> ModuleType:
    """Return Google's differential-privacy accounting, which only a private run needs."""
    try:
        for part in ("pld", "rdp"):
            import_module(f"dp_accounting.{part}")
        return import_module("dp_accounting")
    except ModuleNotFoundError as error:
        raise PomonaError(
            f"[privacy] needs Google's dp-accounting ({error.name} is not installed); run pip install "
            "'pomona[privacy]'"
        ) from error
