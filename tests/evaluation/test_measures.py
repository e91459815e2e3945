"""Losses, answers, ROUGE-L, expert load and intervals against independent computations."""

import math

import numpy as np
import pytest
import torch
from laws.test_federation_laws import base_of, examples, grown, newborn
from scipy import stats
from transformers import AutoModelForCausalLM

from pomona.data.examples import Example
from pomona.evaluation.answers import cohort_answers, greedy_answers
from pomona.evaluation.experts import expert_load
from pomona.evaluation.intervals import paired_bootstrap, ratio_bootstrap
from pomona.evaluation.loss import answer_losses, perplexity, text_loss
from pomona.evaluation.rouge import rouge_l
from pomona.evaluation.work import matmul_speed
from pomona.federation.update import stack
from pomona.models.loading import load_tokenizer


@pytest.fixture(scope="module")
def model(moe_dir):
    return AutoModelForCausalLM.from_pretrained(moe_dir).eval()


def some_examples(count: int) -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(8, 30, (count,), generator=generator).tolist()
    return [
        Example(tuple(torch.randint(3, 300, (n,), generator=generator).tolist()), 4) for n in sizes
    ]


def test_answer_losses_are_transformers_own(model):
    examples = some_examples(9)
    ours = answer_losses(model, examples, 0, batch_size=4)
    for example, loss in zip(examples, ours, strict=True):
        tokens = torch.tensor([example.input_ids])
        labels = tokens.clone()
        labels[:, : example.prompt_length] = -100
        with torch.no_grad():
            theirs = float(model(input_ids=tokens, labels=labels).loss)
        assert loss.tokens == len(example.input_ids) - example.prompt_length
        assert loss.nats / loss.tokens == pytest.approx(theirs, abs=1e-5)


def test_text_loss_is_transformers_own(model):
    windows = torch.randint(3, 300, (5, 20), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        theirs = float(model(input_ids=windows, labels=windows).loss)
    assert text_loss(model, windows, batch_size=2) == pytest.approx(theirs, abs=1e-5)
    assert perplexity(theirs) == pytest.approx(math.exp(theirs))


def test_batched_answers_equal_one_by_one_and_print_nothing(model, moe_dir, capfd):
    tokenizer = load_tokenizer(moe_dir)
    prompts = [list(e.input_ids) for e in some_examples(5)]
    capfd.readouterr()
    together = greedy_answers(model, tokenizer, prompts, 6, batch_size=3)
    alone = [greedy_answers(model, tokenizer, [p], 6)[0] for p in prompts]
    assert together == alone
    assert len(set(together)) > 1
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("batch", [1, 4, 32])
def test_clients_answer_together_as_they_do_alone(moe_dir, batch):
    """Each with its own LoRA and graft, numbers of prompts and lengths; eight together and one by one."""
    base = base_of("mixtral")
    states = [grown(newborn(base, f"c{c}", c % 2), c) for c in range(3)]
    tokenizer = load_tokenizer(moe_dir)
    prompts = [[list(e.input_ids) for e in examples(c, rows)] for c, rows in enumerate((3, 1, 5))]
    with base.attach(stack(states)):
        together = cohort_answers(base.model, tokenizer, prompts, 6, batch)
    assert [len(own) for own in together] == [3, 1, 5]
    for own, state, asked in zip(together, states, prompts, strict=True):
        with base.attach_one(state):
            alone = [greedy_answers(base.model, tokenizer, [p], 6)[0] for p in asked]
        assert own == alone
    assert len({answer for own in together for answer in own}) > 5


def test_rouge_l():
    assert rouge_l("the cat sat", "the cat sat") == 100
    assert rouge_l("dogs", "the cat") == 0
    assert rouge_l("the cats", "the cat") == 100  # stemming
    assert rouge_l("a b", "a b c d") == pytest.approx(100 * 2 * 1 * 0.5 / 1.5)
    assert rouge_l("", "the cat") == 0


def test_expert_load():
    load = expert_load(torch.tensor([[5, 5, 5, 5], [20, 0, 0, 0]]), [4, 4])
    assert load.entropy_L.tolist() == pytest.approx([1.0, 0.0])
    assert load.variation_L.tolist() == pytest.approx([0.0, math.sqrt(3)])
    assert load.share_LE[1].tolist() == [1, 0, 0, 0]


def test_expert_load_of_layers_that_differ_in_experts():
    """What fills a narrow layer up is no expert that nobody uses."""
    counts = torch.tensor([[6, 2, 0, 0], [3, 3, 3, 3], [4, 0, 0, 0], [0, 0, 0, 0]])
    load = expert_load(counts, [2, 4, 1, 3])
    p = 0.75
    half = -(p * math.log2(p) + (1 - p) * math.log2(1 - p))
    assert load.entropy_L.tolist() == pytest.approx([half, 1.0, 1.0, 0.0])
    assert load.variation_L.tolist() == pytest.approx([0.5, 0.0, 0.0, 0.0])
    assert load.layer(0) == [0.75, 0.25]
    assert [len(load.layer(layer)) for layer in range(4)] == [2, 4, 1, 3]


def test_intervals_agree_with_scipy():
    values = np.random.default_rng(1).normal(3, 2, 200)
    ours = ratio_bootstrap([(values, np.ones(200))])
    theirs = stats.bootstrap((values,), np.mean, method="percentile", rng=np.random.default_rng(0))
    assert ours.mean == pytest.approx(values.mean())
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs.confidence_interval), abs=0.05)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    generator = np.random.default_rng(3)
    covered = 0
    for trial in range(200):
        clients = [(generator.normal(m, 1, 60), np.ones(60)) for m in (0.0, 2.0)]
        interval = ratio_bootstrap(clients, seed=trial, draws=400)
        covered += interval.low <= 1.0 <= interval.high
    assert 0.88 <= covered / 200 <= 0.99


def test_pairing_sees_a_small_difference_that_two_intervals_do_not():
    generator = np.random.default_rng(0)
    nats = generator.normal(50, 20, 100)
    tokens = np.full(100, 10.0)
    other = nats + generator.normal(1, 0.5, 100)
    found = paired_bootstrap([(other, tokens)], [(nats, tokens)])
    assert found.difference.mean == pytest.approx((other - nats).sum() / 1000)
    assert found.difference.low > 0
    assert found.p_value < 0.01
    same = paired_bootstrap([(nats, tokens)], [(nats, tokens)])
    assert same.p_value == 1.0
    a, b = ratio_bootstrap([(other, tokens)]), ratio_bootstrap([(nats, tokens)])
    assert a.low < b.high


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_speed_is_that_of_finished_products(device):
    """Whoever does not wait for a GPU times the calls: more than any device computes."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("this machine has no GPU")
    for dtype in (torch.float32, torch.bfloat16):
        assert 1e7 < matmul_speed(device, dtype) < 5e15
