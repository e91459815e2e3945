"""How alike domains are, seen through what pruning for them keeps.

DIVE (arXiv 2506.09351), domain affinity mining.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from scipy.stats import spearmanr
from torch import Tensor

from pomona.evaluation.loss import perplexity, text_loss
from pomona.progress import Progress
from pomona.reconstruction.ffn import DenseModel, pruned, top_channels
from pomona.shapes import Affinity, PerLayerChannel, Tokens

AffinityKind = Literal["perplexity", "scores"]
Correlate = Literal["rows", "columns"]


@dataclass(frozen=True)
class DomainAffinity:
    """What was measured for every domain (a row each) and the correlation of those rows.

    For "perplexity" the rows are p[i, j]: pruned for domain i, measured on domain j. For "scores"
    there is no matrix of that kind and `perplexity_MM` is None. `by_scores_MM` is what the scores say
    where they do not decide, `agreement` the rank correlation of both kinds over all pairs of domains.
    """

    domains: tuple[str, ...]
    correlation_MM: Tensor
    perplexity_MM: Tensor | None = None
    agreement: float | None = None
    by_scores_MM: Tensor | None = None


def perplexity_affinity(
    dense: DenseModel,
    domains: Sequence[str],
    scores: Sequence[PerLayerChannel],
    windows: Sequence[Tokens],
    width: int,
    correlate: Correlate,
    progress: Progress,
) -> DomainAffinity:
    """Prune for every domain and measure on every domain: M² evaluations, of what is kept alone.

    "rows" compares what two domains' pruned models do to all domains, "columns" what all pruned
    models do to two domains; DIVE does not say which.
    """
    perplexity_MM = torch.zeros(len(domains), len(domains), dtype=torch.float64)
    for i, score_LF in enumerate(scores):
        with pruned(dense, top_channels(score_LF, width)):
            for j, windows_BT in enumerate(windows):
                progress("affinity", i * len(domains) + j, len(domains) ** 2)
                perplexity_MM[i, j] = perplexity(text_loss(dense.model, windows_BT))
    progress("affinity", len(domains) ** 2, len(domains) ** 2)
    relative_MM = perplexity_MM.min(dim=0).values / perplexity_MM
    correlation_MM = correlate_rows(relative_MM if correlate == "rows" else relative_MM.T)
    by_scores_MM = score_affinity(domains, scores).correlation_MM
    agreement = rank_agreement(correlation_MM, by_scores_MM)
    return DomainAffinity(tuple(domains), correlation_MM, perplexity_MM, agreement, by_scores_MM)


def rank_agreement(a_MM: Affinity, b_MM: Affinity) -> float | None:
    """Return Spearman's rank correlation over all pairs; None below three domains or without variance."""
    if len(a_MM) < 3:
        return None
    row, column = torch.triu_indices(len(a_MM), len(a_MM), offset=1)
    pairs = a_MM[row, column].numpy(), b_MM[row, column].numpy()
    if any(float(values.std()) == 0 for values in pairs):
        return None
    return float(spearmanr(*pairs).statistic)


def score_affinity(domains: Sequence[str], scores: Sequence[PerLayerChannel]) -> DomainAffinity:
    """Correlate the domains' scores, standardised in every layer: M passes instead of M².

    The logarithm tames scores that span many orders of magnitude.
    """

    def flat(score_LF: Tensor) -> Tensor:
        log_LF = score_LF.clamp_min(1e-30).log()
        centred_LF = log_LF - log_LF.mean(dim=1, keepdim=True)
        return (centred_LF / centred_LF.std(dim=1, keepdim=True).clamp_min(1e-12)).flatten()

    correlation_MM = correlate_rows(torch.stack([flat(score) for score in scores]))
    return DomainAffinity(tuple(domains), correlation_MM)


def correlate_rows(value_MX: Float[Tensor, "M X"]) -> Affinity:
    """Return Pearson's correlation of every two rows, also where a row does not vary.

    Domains that nothing tells apart (nothing was pruned, or all pruned models are alike) count as
    fully alike if their rows are equal and as unrelated otherwise.
    """
    correlation_MM = torch.corrcoef(value_MX)
    equal_MM = (value_MX.unsqueeze(0) == value_MX.unsqueeze(1)).all(dim=2)
    return torch.where(correlation_MM.isnan(), equal_MM.to(value_MX.dtype), correlation_MM)
