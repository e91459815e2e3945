"""Everything one can say about a reconstruction."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any, Literal, get_args

from pomona.errors import PomonaError
from pomona.models.dense import MixtureSizes
from pomona.reconstruction.affinity import AffinityKind, Correlate
from pomona.reconstruction.cluster import Grouping, Linkage
from pomona.reconstruction.compensate import COMPENSATIONS, Compensation, NoCompensation, Ridge
from pomona.reconstruction.planners import PLANNERS, Planner, TopChannels
from pomona.reconstruction.retraining.settings import Retraining
from pomona.reconstruction.router import ROUTERS, Fitted, Router
from pomona.reconstruction.scores import SCORES, WIFV, Score
from pomona.reconstruction.specialise import Specialise


@dataclass(frozen=True)
class ReconstructSettings:
    """How a dense model is taken apart and put together again.

    A token sees `keep · active` of the dense width (and what a planner shares).

    Attributes:
        experts: Per layer. One expert is static pruning: the result stays dense.
        active: Experts that serve a token.
        keep: Share of the dense FFN channels that each expert keeps.
        windows: Calibration windows per domain.
        length: Tokens of a window.
        score: How important a channel is.
        grouping: "affinity" clusters the domains, "random" deals them, "all" gives every expert all of
            them.
        split_domains: Split domains by what their windows look like to the model where there are fewer than
            experts; a single one, a corpus without domains, is always split.
        affinity: How domains are compared: by the "perplexity" of models pruned for one another, or by
            their "scores". Domains that are split are always compared by scores.
        affinity_windows: Windows per domain that measure each pruned model.
        correlate: What of the perplexity matrix is correlated.
        linkage: Of the hierarchical clustering.
        planner: Which channels go to which expert.
        compensation: What the kept columns do for those that are gone.
        router: Where the router's rows come from.
        specialise: Experts learn from the tokens that the router sends them.
        dtype: What the dense model computes in while it is taken apart.
        retrain: Training of the result; without it none.
        seed: Of windows and fits.
    """

    experts: int = 8
    active: int = 2
    keep: float = 0.25
    windows: int = 1024
    length: int = 256
    score: Score = field(default_factory=WIFV)
    grouping: Grouping = "affinity"
    split_domains: bool = False
    affinity: AffinityKind = "perplexity"
    affinity_windows: int = 32
    correlate: Correlate = "rows"
    linkage: Linkage = "average"
    planner: Planner = field(default_factory=TopChannels)
    compensation: Compensation = field(default_factory=Ridge)
    router: Router = field(default_factory=Fitted)
    specialise: Specialise = field(default_factory=Specialise)
    dtype: Literal["float32", "bfloat16"] = "float32"
    retrain: Retraining | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.experts < 1:
            raise PomonaError(
                f"experts {self.experts} is not positive; use 2 or more, 1 only prunes"
            )
        if not 1 <= self.active <= self.experts:
            raise PomonaError(f"active {self.active} is not between 1 and experts {self.experts}")
        if not 0 < self.keep <= 1:
            raise PomonaError(
                f"keep {self.keep} is not a share between 0 and 1; use for example 0.25"
            )
        for name in ("windows", "length", "affinity_windows"):
            if getattr(self, name) < 2:
                raise PomonaError(f"{name} {getattr(self, name)} is too small; use 2 or more")
        for name, kinds in _CHOICES.items():
            if getattr(self, name) not in get_args(kinds):
                known = ", ".join(get_args(kinds))
                raise PomonaError(f'{name} "{getattr(self, name)}" is unknown; use one of {known}')

        self._check_planner()
        refitted = isinstance(self.compensation, Ridge) and isinstance(self.router, Fitted)
        if self.experts > 1 and self.specialise.rounds > 0 and not refitted:
            raise PomonaError(
                "specialising refits by ridge and fits the router; set specialise.rounds to 0 to have "
                "another compensation or router"
            )

    def _check_planner(self) -> None:
        """Raise `PomonaError` where what a planner divides would be refitted or dealt again."""
        plain = isinstance(self.compensation, NoCompensation) and self.specialise.rounds == 0
        if self.experts == 1 or plain or not self.planner.divides:
            return
        raise PomonaError(
            f"the planner {_plain(self.planner)['kind']} divides all channels among the experts, so "
            "there is nothing to compensate and nothing to specialise; set compensation to "
            '"none" and specialise.rounds to 0'
        )

    def check_domains(self, names: Sequence[str]) -> None:
        """Raise `PomonaError` when the domains cannot give every expert one."""
        enough = len(names) >= self.experts or self.grouping == "all"
        if enough or (self.grouping == "affinity" and (self.split_domains or len(names) == 1)):
            return
        other = "set split_domains (--split-domains) to split them"
        if self.grouping == "random":
            other = 'set grouping to "all", or to "affinity" with split_domains: whole domains are dealt'
        raise PomonaError(
            f"{len(names)} domains ({', '.join(names)}) cannot make {self.experts} experts; give at "
            f"least {self.experts} domains, ask for at most {len(names)} experts, or {other}"
        )

    def compared_by(self, domains: int) -> AffinityKind | None:
        """Return what the affinity of so many domains is measured by; None where nobody asks for it.

        Where domains are split it is the scores, whatever `affinity` says: parts are split by the windows
        that calibrate them, no other text is known to be theirs.
        """
        if self.grouping != "affinity" or self.experts == 1:
            return None
        return "scores" if domains < self.experts else self.affinity

    def remarks(self, domains: int) -> tuple[str, ...]:
        """Return what one should be told about so many domains."""
        if self.affinity == self.compared_by(domains) or self.compared_by(domains) is None:
            return ()
        return (
            f"{domains} domains are split to make {self.experts} experts: their parts are compared by "
            "scores, not by perplexity, as no other text is known to be a part's",
        )

    def width(self, channels: int) -> int:
        """Return the channels per expert; raises `PomonaError` when there are none."""
        width = round(self.keep * channels)
        if width < 1:
            raise PomonaError(
                f"keep {self.keep} of {channels} channels leaves an expert none; make keep larger"
            )
        return width

    def sizes(self, channels: int) -> MixtureSizes:
        """Return the sizes made of so many dense channels; raises `PomonaError` if they cannot be."""
        width = self.width(channels)
        shared = self.planner.shared_channels(channels, self.experts, width)
        return MixtureSizes(
            self.experts, self.active, width, shared, self.compensation.biased
        ).aligned()

    def to_json(self) -> dict[str, Any]:
        """Return every setting; what a registry holds as its kind and its own fields."""
        return {name: _plain(value) for name, value in vars(self).items()}


_CHOICES = {
    "grouping": Grouping,
    "affinity": AffinityKind,
    "correlate": Correlate,
    "linkage": Linkage,
}
_REGISTERED: tuple[tuple[str, type[Any]], ...] = (
    *SCORES.items(),
    *PLANNERS.items(),
    *COMPENSATIONS.items(),
    *ROUTERS.items(),
)


def _plain(value: Any) -> Any:
    if not is_dataclass(value) or isinstance(value, type):
        return value
    if isinstance(value, Retraining):
        return asdict(value)
    outside = f"{type(value).__module__}:{type(value).__name__}"
    kind = next((name for name, member in _REGISTERED if member is type(value)), outside)
    return {"kind": kind, **asdict(value)}
