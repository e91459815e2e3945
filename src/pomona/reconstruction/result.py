"""What a reconstruction made."""

from dataclasses import dataclass, field
from pathlib import Path

from pomona.models.dense import MixtureSizes
from pomona.reconstruction.affinity import DomainAffinity
from pomona.reconstruction.cluster import Clusters
from pomona.reconstruction.plan import ExpertPlan


@dataclass(frozen=True)
class Reconstruction:
    """Where it is, from what and how it was made, and how large it is.

    `affinity` and `clusters` are None where domains were not grouped by affinity.
    """

    out: Path
    container: str
    sizes: MixtureSizes
    plan: ExpertPlan = field(repr=False)
    affinity: DomainAffinity | None = field(repr=False)
    clusters: Clusters | None = field(repr=False)
    total_parameters: int
    active_parameters: int
    dense_parameters: int

    def __str__(self) -> str:
        layers, experts, width = self.plan.keep_LEW.shape
        shared = f", {self.sizes.shared} shared" if self.sizes.shared else ""
        lines = [
            f"{layers} layers of {experts} experts, {width} of {self.plan.channels} channels each{shared}",
            f"{self.total_parameters:,} parameters, {self.active_parameters:,} active per token "
            f"(dense: {self.dense_parameters:,})",
            *(f"expert {e}: {', '.join(group)}" for e, group in enumerate(self.plan.groups)),
        ]
        if self.affinity is not None and self.affinity.agreement is not None:
            lines.append(
                "rank correlation of the affinity by perplexity and the one by scores: "
                f"{self.affinity.agreement:.3f}"
            )
        return "\n".join(lines)
