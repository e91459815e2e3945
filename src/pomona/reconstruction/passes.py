"""The work of a reconstruction, from shapes: how many tokens pass through how much of which model."""

from dataclasses import dataclass

from pomona.reconstruction.compensate import NoCompensation
from pomona.reconstruction.retraining import Retraining
from pomona.reconstruction.router import Fitted, RandomRouter
from pomona.reconstruction.settings import ReconstructSettings


@dataclass(frozen=True)
class PerToken:
    """FLOPs of one token's forward pass: the dense model and one of its `layers` (the head is in no layer).

    And the mixture, as it is used and with every expert serving the token; the latter is 0 without a router.
    """

    dense: int
    layer: int
    layers: int
    active: int
    every: int


def assembling_work(
    settings: ReconstructSettings, domains: int, per: PerToken, at_once: int
) -> int:
    """Return the FLOPs of all passes of windows through the dense model.

    Domains are split and calibrated once, their affinity by perplexity is `domains`² passes; experts need
    one pass for every set of `at_once` layers, through all layers before it. What is computed of one
    layer alone, fits and specialising, comes on top.
    """
    tokens = settings.windows * settings.length
    split = settings.grouping == "affinity" and domains < settings.experts
    whole = domains * tokens  # calibration
    work = 0
    if split:
        whole += min(domains, settings.experts - domains) * tokens  # what their windows look like
    if settings.score.gradients:
        work += 2 * domains * tokens * per.dense  # there and back
    if settings.compared_by(domains) == "perplexity":
        work += domains**2 * settings.affinity_windows * settings.length * per.dense
    ends = [min(first + at_once, per.layers) for first in range(0, per.layers, at_once)]
    grouped = (domains if split else settings.experts) * tokens
    return work + (whole * per.layers + _observed(settings, grouped) * sum(ends)) * per.layer


def _observed(settings: ReconstructSettings, grouped: int) -> int:
    """Return the tokens of one set of layers, of `grouped` that the groups have together."""
    seen = 0 if isinstance(settings.compensation, NoCompensation) else grouped
    if settings.experts == 1:
        return seen
    if isinstance(settings.router, Fitted):
        seen += min(settings.router.tokens * settings.experts, grouped)
    elif not isinstance(settings.router, RandomRouter):
        seen += grouped
    if settings.specialise.rounds > 0:
        seen += min(settings.specialise.tokens, grouped)
    return seen


def retraining_work(how: Retraining | None, per: PerToken) -> int:
    """Return the FLOPs of both stages and the teacher; going back counts twice a forward pass.

    In the first stage once: the experts, which all serve every token there, are not learning. With
    checkpointing the forward pass is made once more.
    """
    if how is None:
        return 0
    teacher = per.dense if how.objective.loss == "distil" else 0
    again = 1 if how.checkpointing else 0
    first = how.router.tokens * ((2 + again) * per.every + teacher) if per.every else 0
    return first + how.experts.tokens * ((3 + again) * per.active + teacher)
