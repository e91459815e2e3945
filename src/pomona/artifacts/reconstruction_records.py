"""How a reconstruction was made, beside the checkpoint: JSON one can read, and one picture."""

from dataclasses import asdict
from pathlib import Path

import torch

from pomona.artifacts.figures import affinity_map
from pomona.files import read_object, write_json, write_text
from pomona.models.dense import MixtureSizes
from pomona.reconstruction.affinity import DomainAffinity
from pomona.reconstruction.cluster import Clusters
from pomona.reconstruction.plan import ExpertPlan
from pomona.reconstruction.result import Reconstruction
from pomona.reconstruction.settings import ReconstructSettings


def write_records(folder: Path, made: Reconstruction, settings: ReconstructSettings) -> None:
    """Write settings, plan and, where domains were grouped by affinity, that and the clusters."""
    folder.mkdir()
    write_json(folder / "settings.json", settings.to_json())
    write_json(folder / "plan.json", made.plan.to_json())
    write_json(
        folder / "result.json",
        {
            "container": made.container,
            "sizes": asdict(made.sizes),
            "total_parameters": made.total_parameters,
            "active_parameters": made.active_parameters,
            "dense_parameters": made.dense_parameters,
        },
    )
    if made.affinity is None or made.clusters is None:
        return
    matrix, scores = made.affinity.perplexity_MM, made.affinity.by_scores_MM
    write_json(
        folder / "affinity.json",
        {
            "kind": "scores" if matrix is None else "perplexity",
            "domains": list(made.affinity.domains),
            "perplexity": None if matrix is None else matrix.tolist(),
            "correlation": made.affinity.correlation_MM.tolist(),
            "correlation_by_scores": None if scores is None else scores.tolist(),
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


def read_records(folder: Path, out: Path) -> Reconstruction:
    """Return what `write_records` described, as made in `out`."""
    result = read_object(folder / "result.json")
    affinity = clusters = None
    if (folder / "affinity.json").is_file():
        found, groups = read_object(folder / "affinity.json"), read_object(folder / "clusters.json")
        matrix, scores = found["perplexity"], found.get("correlation_by_scores")
        affinity = DomainAffinity(
            tuple(found["domains"]),
            torch.tensor(found["correlation"], dtype=torch.float64),
            None if matrix is None else torch.tensor(matrix, dtype=torch.float64),
            found["rank_correlation_with_scores"],
            None if scores is None else torch.tensor(scores, dtype=torch.float64),
        )
        clusters = Clusters(tuple(tuple(group) for group in groups["experts"]), groups["tree"])
    return Reconstruction(
        out,
        result["container"],
        MixtureSizes(**result["sizes"]),
        ExpertPlan.from_json(read_object(folder / "plan.json")),
        affinity,
        clusters,
        result["total_parameters"],
        result["active_parameters"],
        result["dense_parameters"],
    )
