"""Asking sites until enough of them have answered; who is new is told first what the federation is."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from math import ceil
from time import monotonic
from typing import Protocol, runtime_checkable

from pomona.errors import PomonaError
from pomona.parcel import Parcel, Refused
from pomona.pipelines.federate.heard import Presented, not_refused, presented
from pomona.progress import Progress, Tell


@runtime_checkable
class Sites(Protocol):
    """Asks sites, and hears their answers; what carries the messages is its own affair."""

    def ask(
        self,
        parcels: Mapping[str, Parcel],
        seconds: float,
        enough: Callable[[Set[str]], bool] = lambda away: False,
    ) -> Iterator[tuple[str, Parcel | Refused]]:
        """Send every site its parcel and yield answers as they come, until all are there or time is up.

        A site that is away is waited for, and asked when it is back. Who has another parcel in `parcels` when
        the next answer is asked for is sent that too. `enough` is told now and then who is away, and ends it.
        """
        ...


@dataclass(frozen=True)
class Patience:
    """How long a round waits, and how many answers it needs to count.

    A round ends when everybody who was asked has answered, or after `deadline` seconds if at least the share
    `quorum` of them has; if all the others are away, after `absence` seconds more. Otherwise they are asked
    again, `retries` times. A change whose norm is more than `largest_change` times one plus that of what was
    sent is rejected.
    """

    deadline: float = 600.0
    absence: float = 60.0
    quorum: float = 0.5
    retries: int = 2
    largest_change: float = 10.0

    def __post_init__(self) -> None:
        if not 0 < self.deadline < float("inf"):
            raise PomonaError(f"deadline {self.deadline} is no time; give seconds, for example 600")
        if not 0 <= self.absence < float("inf"):
            raise PomonaError(f"absence {self.absence} is no time; give seconds, for example 60")
        if not 0 < self.quorum <= 1:
            raise PomonaError(f"quorum {self.quorum} is no share of the sites; use for example 0.5")
        if self.retries < 0:
            raise PomonaError(f"retries {self.retries} is negative; use 0 or more")
        if not 0 < self.largest_change < float("inf"):
            raise PomonaError(
                f"largest_change {self.largest_change} is not positive; use for example 10"
            )

    def least(self, asked: int) -> int:
        """Return how many of those who were asked have to answer."""
        return max(1, ceil(self.quorum * asked - 1e-9))


@dataclass(frozen=True)
class Hello:
    """What a site is told when it is new: the federation, its recipe and base model, what a warm start has."""

    federation: str
    recipe: str
    model: dict[str, str]
    first: bytes = field(default=b"", repr=False)

    def to(self, name: str) -> Parcel:
        """Return it for one site."""
        told = {"federation": self.federation, "recipe": self.recipe, "model": self.model}
        return Parcel("hello", {**told, "site": name}, self.first)


@dataclass(frozen=True)
class Asking:
    """Asks sites with patience; `present` is what each has said of itself."""

    sites: Sites
    patience: Patience
    hello: Hello
    progress: Progress
    tell: Tell
    present: dict[str, Presented] = field(default_factory=dict[str, Presented])

    def greet(self, names: Iterable[str]) -> None:
        """Tell sites what the federation is, and hear who they are; who does not answer is left out."""
        waiting, here = dict.fromkeys(names), set[str]()
        enough = self._enough(waiting, here, self.patience.least(len(waiting)))
        parcels = {name: self.hello.to(name) for name in waiting}
        for name, answer in self.sites.ask(parcels, self.patience.deadline, enough):
            waiting.pop(name, None)
            if self._heard(name, answer):
                here.add(name)

    def _heard(self, name: str, answer: Parcel | Refused) -> bool:
        """Note what a site says of itself, and tell whether it takes part."""
        try:
            self.present[name] = presented(name, not_refused(answer), self.hello.model)
        except PomonaError as error:
            self.tell(f'site "{name}" does not take part: {error}')
        return name in self.present

    def gather(
        self,
        parcels: Mapping[str, Parcel],
        keep: Callable[[str, Parcel], None],
        what: str,
        least: int = 1,
    ) -> None:
        """Ask until enough have answered; raises `PomonaError` when they do not."""
        least = max(least, self.patience.least(len(parcels)))
        waiting, answered = dict.fromkeys(parcels), set[str]()
        for attempt in range(self.patience.retries + 1):
            self._ask(parcels, keep, what, least, (waiting, answered))
            if not waiting or len(answered) >= least:
                break
            again = "; they are asked again" if attempt < self.patience.retries else ""
            self.tell(
                f"{what}: {len(answered)} of {len(parcels)} sites have answered and {least} are needed; "
                f"missing: {', '.join(waiting)}{again}"
            )
        if len(answered) < min(least, len(parcels)):
            raise PomonaError(
                f"{what}: {len(answered)} of {len(parcels)} sites have answered and {least} are needed; start "
                "the missing ones and run the same command again to go on with this round, or lower --quorum"
            )

    def _ask(
        self,
        asked: Mapping[str, Parcel],
        keep: Callable[[str, Parcel], None],
        what: str,
        least: int,
        progress: tuple[dict[str, None], set[str]],
    ) -> None:
        """Ask those who are waited for, once; a site that knows nothing yet is told first."""
        waiting, answered = progress
        work = {name: asked[name] for name in waiting}
        parcels = {
            name: work[name] if name in self.present else self.hello.to(name) for name in work
        }
        self.progress(what, len(answered), len(asked))
        enough = self._enough(waiting, answered, least)
        for name, answer in self.sites.ask(parcels, self.patience.deadline, enough):
            if parcels[name].kind == "hello":
                if self._heard(name, answer):
                    parcels[name] = work[name]
                else:
                    waiting.pop(name)
                continue
            if isinstance(answer, Parcel) and answer.kind == "unknown":
                parcels[name] = self.hello.to(name)  # its state is new
                continue
            waiting.pop(name, None)
            try:
                keep(name, not_refused(answer))
            except PomonaError as error:
                self.tell(f'{what}: site "{name}" does not count: {error}')
            else:
                answered.add(name)
            self.progress(what, len(answered), len(asked))

    def _enough(
        self, waiting: Mapping[str, None], answered: Set[str], least: int
    ) -> Callable[[Set[str]], bool]:
        """Return what tells that enough have answered and the others have been away for long."""
        since: list[float] = []

        def enough(away: Set[str]) -> bool:
            if len(answered) < least or not waiting.keys() <= away:
                since.clear()
                return False
            if not since:
                since.append(monotonic())
            return monotonic() - since[0] >= self.patience.absence

        return enough
