"""Exact match, seeds, corrections and drift against independent computations."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pomona.evaluation.exact import exact_match, normalised
from pomona.evaluation.experts import load_drift
from pomona.evaluation.intervals import paired_bootstrap, ratio_bootstrap
from pomona.evaluation.significance import holm, seed_comparison, seed_interval


@pytest.mark.parametrize(
    ("answer", "reference", "same"),
    [
        ("The Cat.", "cat", True),
        ("a cat,  a dog", "Cat dog!", True),
        ("cats", "cat", False),
        ("", "cat", False),
        ("Half of 24 is 12.\n#### 12", "6 + 6 = 12\n#### 12", True),
        ("#### 1,200.00", "so\n#### 1200", True),
        ("####$18", "#### 18", True),
        ("#### -3", "#### 3", False),
        ("#### -$3", "#### -3", True),
        ("#### $ -3", "#### -3", True),
        ("#### --3", "#### 3", False),
        ("#### -$-3", "#### -3", False),
        ("it is 12", "#### 12", False),
        ("#### 7\n#### 12", "#### 12", True),
        ("#### 12\n#### 7", "#### 12", False),
        ("#### twelve", "#### 12", False),
        ("#### 12", "12", True),
    ],
)
def test_exact_match(answer, reference, same):
    assert exact_match(answer, reference) == (100.0 if same else 0.0)


def test_every_real_worked_answer_matches_itself_and_no_other_number(data_dir):
    import json

    lines = (data_dir / "gsm8k/test.jsonl").read_text("utf-8").splitlines()[:200]
    references = [json.loads(line)["answer"] for line in lines]
    assert len(references) == 200
    for reference in references:
        said = reference.rpartition("####")[2].strip()
        assert exact_match(f"I think\n#### {said}.", reference) == 100
        assert exact_match(f"I think\n#### {said}7", reference) == 0
        assert exact_match(f"I think {said}", reference) == 0


@given(st.text())
def test_normalising_twice_is_normalising_once(text):
    assert normalised(normalised(text)) == normalised(text)
    assert exact_match(text, normalised(text)) == 100 or "####" in text


def test_seeds_agree_with_scipy():
    figures = np.random.default_rng(0).normal(3, 1, 5)
    ours = seed_interval(figures.tolist())
    theirs = stats.t.interval(0.95, 4, figures.mean(), stats.sem(figures))
    assert ours is not None
    assert (ours.low, ours.high) == pytest.approx(theirs)
    others = np.random.default_rng(1).normal(2, 1, 5)
    found = seed_comparison(figures.tolist(), others.tolist())
    assert found is not None
    assert found.p_value == pytest.approx(stats.ttest_rel(figures, others).pvalue)
    assert found.difference.mean == pytest.approx((figures - others).mean())


def test_two_seeds_give_no_interval_and_equal_ones_no_difference():
    assert seed_interval([1.0, 2.0]) is None
    assert seed_comparison([1.0, 2.0], [1.0, 2.0]) is None
    same = seed_comparison([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert same is not None
    assert same.p_value == 1.0
    shifted = seed_comparison([1.0, 2.0, 3.0], [0.5, 1.5, 2.5])
    assert shifted is not None
    assert shifted.p_value == 0.0


def test_holm_by_hand():
    """Sorted: 0.01·4, 0.02·3, 0.03·2, 0.2·1, each at least the one before."""
    assert holm([0.02, 0.2, 0.01, 0.03]) == pytest.approx([0.06, 0.2, 0.04, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_rejects_what_stepping_down_rejects(p_values):
    corrected = holm(p_values)
    for level in (0.01, 0.05, 0.2):
        rejected = set()
        for step, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
            if p_values[i] * (len(p_values) - step) > level:
                break
            rejected.add(i)
        assert {i for i, p in enumerate(corrected) if p <= level} == rejected


def test_perplexity_is_the_exponential_of_each_clients_loss():
    clients = [(np.array([2.0, 4.0]), np.array([1.0, 2.0])), (np.array([3.0]), np.array([3.0]))]
    assert ratio_bootstrap(clients, transform=np.exp).mean == pytest.approx((np.e**2 + np.e) / 2)
    twice = [(2 * top, bottom) for top, bottom in clients]
    found = paired_bootstrap(twice, clients, transform=np.exp)
    assert found.difference.mean == pytest.approx((np.e**4 + np.e**2 - np.e**2 - np.e) / 2)


def test_drift_is_half_the_sum_of_what_shares_differ_by():
    base = torch.tensor([[5, 5, 0], [10, 0, 0], [3, 3, 3], [0, 0, 0]])
    now = torch.tensor([[10, 0, 0], [0, 10, 10], [1, 1, 1], [0, 0, 0]])
    assert load_drift(now, base).tolist() == pytest.approx([0.5, 1.0, 0.0, 0.0])


@given(st.integers(0, 2**31))
def test_drift_never_says_more_than_the_share_that_moved(seed):
    generator = torch.Generator().manual_seed(seed)
    before, after = (torch.randint(5, (40,), generator=generator) for _ in range(2))
    counts = [torch.bincount(choice, minlength=5).unsqueeze(0) for choice in (before, after)]
    assert float(load_drift(*counts)) <= float((before != after).double().mean()) + 1e-12
