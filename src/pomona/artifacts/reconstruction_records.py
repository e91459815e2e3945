"""How a reconstruction was made, beside the checkpoint: JSON one can read, and one picture."""

from pathlib import Path

from pomona.artifacts.figures import affinity_map
from pomona.files import write_json, write_text
from pomona.reconstruction.result import Reconstruction
from pomona.reconstruction.settings import ReconstructSettings


def write_records(folder: Path, made: Reconstruction, settings: ReconstructSettings) -> None:
    """Write settings, plan and, where domains were grouped by affinity, that and the clusters."""
    folder.mkdir()
    write_json(folder / "settings.json", settings.to_json())
    write_json(folder / "plan.json", made.plan.to_json())
    if made.affinity is None or made.clusters is None:
        return
    matrix = made.affinity.perplexity_MM
    write_json(
        folder / "affinity.json",
        {
            "kind": "scores" if matrix is None else "perplexity",
            "domains": list(made.affinity.domains),
            "perplexity": None if matrix is None else matrix.tolist(),
            "correlation": made.affinity.correlation_MM.tolist(),
            "rank_correlation_with_scores": made.affinity.agreement,
        },
    )
    write_json(
        folder / "clusters.json",
        {
            "linkage": settings.linkage,
            "experts": [list(group) for group in made.clusters.groups],
            "tree": made.clusters.tree,
        },
    )
    if made.clusters.tree:
        write_text(folder / "affinity.svg", affinity_map(made.affinity, made.clusters))
