"""Rehearsal: what the base says by itself, and what holding a model to it does."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import save_tokenizer
from laws.test_federation_laws import base_of, examples, grown, newborn

from pomona.errors import PomonaError
from pomona.federation.dp_sgd import DPSGD
from pomona.federation.local import LocalTraining, train_cohort
from pomona.federation.rehearsal import Rehearsal, coarse, first_token
from pomona.federation.stage import Task
from pomona.federation.strategies import FedAvg
from pomona.federation.update import ClientState
from pomona.models.loading import load_tokenizer

SHORT = Rehearsal(texts=6, length=10, top=8)
STEPS = LocalTraining(steps=3, batch=2, learning_rate=1e-2)


def rehearsing(base, rehearsal=SHORT, seed=0):
    return replace(base, rehearsed=rehearsal.begin(base.model, 1, seed))


def trained(base, states, training=STEPS):
    tasks = [Task(f"c{c}", state, examples(c)) for c, state in enumerate(states)]
    return train_cohort(base, tasks, training, FedAvg(), 0, 1, 1, 0)


def distance(base, rehearsed, state) -> float:
    """KL(base ‖ tuned) per token over all texts, the whole vocabulary, by torch's own loss."""

    def log_probabilities():
        with torch.no_grad():
            return base.model(input_ids=rehearsed.ids).logits[:, :-1].log_softmax(-1)

    plain = log_probabilities()
    with base.attach_one(state):
        tuned = log_probabilities()
    kl = torch.nn.functional.kl_div(tuned, plain, reduction="none", log_target=True)
    return float(kl.sum(-1).mean())


@pytest.mark.parametrize("top", [1, 8, 63])
def test_coarse_probabilities_are_numpys(top):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 3, 64))
    index = np.argsort(-logits, -1)[..., :top]
    found = coarse(torch.tensor(logits), torch.tensor(index)).exp().numpy()
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    kept = np.take_along_axis(shares, index, -1)
    np.testing.assert_allclose(found[..., :-1], kept, rtol=1e-10)
    np.testing.assert_allclose(found[..., -1], 1 - kept.sum(-1), rtol=1e-8)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v3", "jamba"])
def test_with_the_whole_vocabulary_it_is_kl_itself(family):
    base = base_of(family)
    whole = rehearsing(base, Rehearsal(2.0, rows=6, texts=6, length=10, top=10**6))
    state = grown(newborn(base, "c"), 1)
    every = [list(range(6))]
    with base.attach_one(state), torch.no_grad():
        (found,) = whole.rehearsed.losses(base.model, every)
    assert float(found) == pytest.approx(2 * distance(base, whole.rehearsed, state), rel=1e-4)
    coarser = rehearsing(base, Rehearsal(2.0, rows=6, texts=6, length=10, top=4))
    with base.attach_one(state), torch.no_grad():
        (less,) = coarser.rehearsed.losses(base.model, every)
    assert 0 < less <= found
    with base.attach_one(ClientState()), torch.no_grad():
        assert whole.rehearsed.losses(base.model, every).abs().max() < 1e-6


def test_the_base_says_the_same_for_the_same_seed_and_leaves_chance_alone():
    base = base_of("mixtral")
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one, again, other = (rehearsing(base, seed=s).rehearsed for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.ids, again.ids) and torch.equal(one.share, again.share)
    assert not torch.equal(one.ids, other.ids)
    assert one.ids.shape == (6, 10)
    assert set(one.ids[:, 0].tolist()) == {1}
    assert len({tuple(text) for text in one.ids.tolist()}) == 6


def test_texts_are_drawn_for_every_client_and_step():
    rehearsed = rehearsing(base_of("mixtral"), replace(SHORT, rows=2)).rehearsed
    drawn = rehearsed.drawn(0, 1, "a", 0, 5)
    assert np.array(drawn).shape == (5, 2)
    assert rehearsed.drawn(0, 1, "a", 2, 5) == drawn[2:]
    for key in ((1, 1, "a"), (0, 2, "a"), (0, 1, "b")):
        assert rehearsed.drawn(*key, 0, 5) != drawn


def test_more_weight_keeps_a_client_nearer_to_the_base():
    base = base_of("mixtral")
    far, near, nearest = (
        distance(own, rehearsing(base).rehearsed, trained(own, [newborn(own, "c")])[0].state)
        for own in (
            base,
            rehearsing(base, replace(SHORT, weight=3.0, rows=6)),
            rehearsing(base, replace(SHORT, weight=100.0, rows=6)),
        )
    )
    assert nearest < 0.9 * near < 0.8 * far


def test_the_loss_that_is_told_is_the_rows_own():
    base = base_of("mixtral")
    state = grown(newborn(base, "c"), 1)
    once = replace(STEPS, steps=1)
    (plain,) = trained(base, [state], once)
    (held,) = trained(rehearsing(base, replace(SHORT, weight=50.0)), [state], once)
    assert held.losses == pytest.approx(plain.losses)
    assert any(not torch.equal(v, plain.state.adapter[n]) for n, v in held.state.adapter.items())


@pytest.mark.parametrize("noise", [None, DPSGD(1.0, 0.5)])
def test_a_cohort_rehearses_as_its_clients_do_one_by_one(noise):
    base = rehearsing(base_of("mixtral"), replace(SHORT, rows=2))
    states = [grown(newborn(base, f"c{c}", c), c) for c in range(3)]
    training = replace(STEPS, dp_sgd=noise)
    together = trained(base, states, training)
    for c, state in enumerate(states):
        task = Task(f"c{c}", state, examples(c))
        (alone,) = train_cohort(base, [task], training, FedAvg(), 0, 1, 1, 0)
        for part in ("adapter", "graft"):
            for name, value in getattr(together[c].state, part).items():
                torch.testing.assert_close(
                    value, getattr(alone.state, part)[name], rtol=1e-4, atol=1e-5
                )


def test_noise_of_dp_sgd_does_not_hide_what_is_rehearsed():
    """It is made of what the base says, not of rows: it is added to the noised gradient as it is."""
    base = base_of("mixtral")
    training = replace(STEPS, dp_sgd=DPSGD(1.0, 0.5))
    held = rehearsing(base, replace(SHORT, weight=100.0, rows=6))
    far, near = (
        distance(own, held.rehearsed, trained(own, [newborn(own, "c")], training)[0].state)
        for own in (base, held)
    )
    assert near < 0.7 * far


def test_a_text_begins_with_the_token_that_the_tokenizer_has(tmp_path):
    save_tokenizer(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert first_token(tokenizer) == tokenizer.bos_token_id != tokenizer.eos_token_id
    tokenizer.bos_token = None
    assert first_token(tokenizer) == tokenizer.eos_token_id
    tokenizer.eos_token = None
    with pytest.raises(PomonaError, match="neither a beginning- nor an end-of-sequence token"):
        first_token(tokenizer)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"weight": 0.0}, "rehearsal weight 0.0 is not positive"),
        ({"weight": float("nan")}, "rehearsal weight nan is not positive"),
        ({"rows": 0}, "rehearsal rows 0 is too small; use 1 or more"),
        ({"texts": 0}, "rehearsal texts 0 is too small"),
        ({"length": 1}, "rehearsal length 1 is too small; use 2 or more"),
        ({"top": 0}, "rehearsal top 0 is too small"),
    ],
)
def test_what_makes_no_sense_is_told(given, said):
    with pytest.raises(PomonaError, match=said):
        replace(SHORT, **given)
