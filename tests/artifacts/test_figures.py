"""Plots: what is drawn is what was measured."""

import re

import pytest
import torch

from pomona.artifacts.figures import affinity_map
from pomona.reconstruction.affinity import (
    DomainAffinity,
    perplexity_affinity,
    rank_agreement,
    score_affinity,
)
from pomona.reconstruction.calibrate import calibrate
from pomona.reconstruction.cluster import Clusters, cluster
from pomona.reconstruction.scores import WIFV, score_layers


def words(svg):
    return [text.strip() for text in re.findall(r"<text[^>]*>([^<]*)</text>", svg)]


@pytest.fixture
def measured(dense_dir):
    """Four domains by perplexity of a real model, and the same by their scores alone."""
    from transformers import AutoModelForCausalLM

    from pomona.models.dense import LLAMA
    from pomona.models.experts import freeze
    from pomona.models.weights import Checkpoint
    from pomona.progress import silent
    from pomona.reconstruction.ffn import dense_model

    model = AutoModelForCausalLM.from_pretrained(dense_dir)
    freeze(model)
    dense = dense_model(model, LLAMA, Checkpoint.open(dense_dir))
    windows = [
        torch.randint(3, 300, (6, 24), generator=torch.Generator().manual_seed(i)) for i in range(4)
    ]
    scores = [score_layers(WIFV(), calibrate(dense, own), dense) for own in windows]
    names = ("plums", "pears", "figs", "nuts")
    both = perplexity_affinity(dense, names, scores, windows, 8, "rows", silent)
    return both, score_affinity(names, scores)


def test_both_affinities_stand_side_by_side_with_their_rank_correlation(measured):
    both, by_scores = measured
    assert torch.equal(both.by_scores_MM, by_scores.correlation_MM)
    expected = rank_agreement(both.correlation_MM, by_scores.correlation_MM)
    groups = cluster(both, 2, "average")
    drawn = affinity_map(both, groups)
    assert f"rank correlation of both affinities: {expected:.3f}" in words(drawn)
    assert [word for word in words(drawn) if word.startswith("by ")] == [
        "by perplexity",
        "by scores",
    ]
    assert {affinity_map(both, groups) for _ in range(5)} == {drawn}
    assert drawn.count("<image") == 2 + 2  # a colour scale each
    for name in both.domains:
        assert words(drawn).count(name) == 3  # rows once, columns of both


def test_scores_alone_are_one_map(measured):
    _, by_scores = measured
    drawn = affinity_map(by_scores, cluster(by_scores, 2, "average"))
    assert [word for word in words(drawn) if word.startswith(("by ", "rank"))] == ["by scores"]
    assert drawn.count("<image") == 1 + 1


def test_two_domains_have_no_rank_correlation():
    one = torch.eye(2, dtype=torch.float64)
    both = DomainAffinity(("a", "b"), one, one, None, one)
    drawn = affinity_map(both, Clusters((("a",), ("b",)), [[0, 1, 1.0, 2]]))
    assert "rank correlation of both affinities: not defined" in words(drawn)
