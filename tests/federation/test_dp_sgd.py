"""DP-SGD at the clients: gradients of single rows against plain autograd, noise, sampling and ε."""

import json
import math
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import dp_accounting
import numpy as np
import pytest
import torch
from conftest import now_and_then
from families import double
from hypothesis import given
from hypothesis import settings as hypotheses
from hypothesis import strategies as st
from laws.test_federation_laws import TARGETS, base_of, examples, grown, newborn
from test_federate import WRITES, files_of, run, stopped_after

from pomona.artifacts.report import write_report
from pomona.artifacts.run import RunDirectory
from pomona.data.examples import Example, collate
from pomona.errors import PomonaError
from pomona.federation.cohort import FrozenBase
from pomona.federation.dp_sgd import DPSGD, RowNoise, clipped_sums, row_epsilon, steps_of
from pomona.federation.early_stop import EarlyStop
from pomona.federation.graft import Graft
from pomona.federation.local import LocalTraining, train_cohort
from pomona.federation.privacy import KEY, Privacy
from pomona.federation.sampling import samples
from pomona.federation.selection import (
    SELECTIONS,
    RandomExpert,
    Reconstruction,
    SameExpert,
)
from pomona.federation.settings import FederateSettings, Finish
from pomona.federation.stage import Stage, Task
from pomona.federation.strategies import FedAvg, FedProx, FLoRA, Scaffold, Tilted
from pomona.federation.update import ClientState, stack
from pomona.models.experts import find_expert_sites, freeze
from pomona.models.lora import LoRA
from pomona.pipelines.federate import federate
from pomona.recipe import dump, read_recipe
from pomona.training.loop import AdamW
from pomona.training.loss import completion_losses

DP = DPSGD(0.5, 1.0)


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv(KEY, raising=False)


def doubled(state: ClientState) -> ClientState:
    def one(tensors):
        return {n: v.double() if v.is_floating_point() else v for n, v in tensors.items()}

    return ClientState(one(state.adapter), one(state.graft), one(state.personal))


def exact(family: str, graft: Graft, lora: LoRA, personal: LoRA | None = None):
    """A base in float64 and three clients' states that training has moved, experts of their own."""
    model = double(family)
    freeze(model)
    base = FrozenBase(model, lora, graft, tuple(find_expert_sites(model)), personal)
    states = []
    for c in range(3):
        state = grown(newborn(base, f"c{c}", c % 2), c)
        own = base.init_personal(0, f"c{c}")
        moved = grown(ClientState(own), 9 + c).adapter
        states.append(doubled(replace(state, personal=moved)))
    return base, states


def learning(state: ClientState) -> dict[str, torch.Tensor]:
    parts = {"adapter": state.adapter, "graft": state.graft, "personal": state.personal}
    return {
        f"{part}.{n}": v
        for part, own in parts.items()
        for n, v in sorted(own.items())
        if v.is_floating_point()
    }


def alone(base: FrozenBase, state: ClientState, row: Example):
    """One row's loss and gradient, by autograd on a cohort of one and a batch of one."""

    def leaves(tensors):
        return {
            n: v.clone().requires_grad_() if v.is_floating_point() else v
            for n, v in tensors.items()
        }

    state = ClientState(leaves(state.adapter), leaves(state.graft), leaves(state.personal))
    batch = collate([row], 0)
    with base.attach_one(state):
        loss = completion_losses(
            base.model, batch.input_ids_BT, batch.attention_mask_BT, batch.label_mask_BT, 1
        )
    loss.sum().backward()
    return float(loss.detach()), {n: v.grad for n, v in learning(state).items()}


def stage_of(base, states, rows, drawn, noise=None) -> Stage:
    tasks = [
        Task(f"c{c}", state, own) for c, (state, own) in enumerate(zip(states, rows, strict=True))
    ]
    return Stage(base, tasks, drawn, FedAvg(), AdamW(), 0.0, 0, noise)


def with_leaves(states) -> ClientState:
    stacked = stack(states)
    for value in learning(stacked).values():
        value.requires_grad_()
    return stacked


@pytest.mark.parametrize(
    ("family", "graft", "lora", "personal"),
    [
        ("mixtral", Graft(rank=2), LoRA(2, 4.0), None),
        ("mixtral", Graft(rank=2, gate="resident", count=2), LoRA(2, 4.0, experts=True), None),
        (
            "qwen2_moe",
            Graft(weights="full", bias=True),
            LoRA(2, 4.0),
            LoRA(2, 4.0, ("q_proj", "o_proj")),
        ),
        ("deepseek_v2", Graft(rank=2), LoRA(2, 4.0, TARGETS["deepseek_v2"]), None),
        ("gpt_oss", Graft(weights="full", form="copy"), LoRA(2, 4.0), None),
    ],
)
def test_gradients_of_rows_are_those_of_a_loop_over_single_rows(family, graft, lora, personal):
    base, states = exact(family, graft, lora, personal)
    rows = [examples(c) for c in range(3)]
    drawn = [[[0, 3, 1]], [[2, 4]], [[1]]]
    loss_X, gradients = stage_of(base, states, rows, drawn).row_gradients(0, with_leaves(states))
    assert gradients.keys() == learning(states[0]).keys()
    for c in range(3):
        for place in range(3):
            at = 3 * c + place
            if place >= len(drawn[c][0]):
                assert loss_X[at] == 0
                assert not any(g[at].any() for g in gradients.values())
                continue
            loss, expected = alone(base, states[c], rows[c][drawn[c][0][place]])
            # the loss is computed in float32, whatever the model
            assert float(loss_X[at]) == pytest.approx(loss, rel=1e-6)
            for name, gradient in gradients.items():
                torch.testing.assert_close(gradient[at], expected[name], rtol=1e-4, atol=1e-7)
            assert all(g[at].any() for n, g in gradients.items() if n.endswith("lora_A"))


def numpys_step(base, state, rows, counts_of, clip, noise):
    """Clip, sum, add what is given as noise, divide: DP-SGD (algorithm 1) in NumPy."""
    gradients = [alone(base, state, row)[1] for row in rows]
    total = {n: np.zeros(v.shape) for n, v in gradients[0].items()}
    for own in gradients:
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in own.values()))
        for name, g in own.items():
            total[name] += g.double().numpy() / max(1.0, norm / clip)
    return {n: (value + noise[n]) / counts_of for n, value in total.items()}


def noise_of(noise: RowNoise, client: str, like, step: int):
    """The noise alone: that of rows whose gradients are zero."""
    zero = {n: torch.zeros(1, *v.shape, dtype=torch.float64) for n, v in like.items()}
    return {n: v[0].numpy() for n, v in noise.mean(zero, [client], [1], step).items()}


@pytest.mark.parametrize("clip", [0.05, 1e6])
def test_a_step_is_numpys(clip):
    """SCAFFOLD's control variate is the gradient that AdamW has seen: clipped, noised, divided."""
    base, states = exact("mixtral", Graft(rank=2), LoRA(2, 4.0))
    strategy, dp = Scaffold(), DPSGD(clip, 0.7)
    rows = [examples(0, 3), examples(1, 8)]
    born = [strategy.birth(state.adapter) for state in states]
    tasks = [Task(f"c{c}", replace(states[c], memory=born[c]), rows[c], born[c]) for c in range(2)]
    training = LocalTraining(steps=1, batch=4, dp_sgd=dp)
    trained = train_cohort(base, tasks, training, strategy, 5, 2, 3, 0)
    noise = RowNoise(dp, "seed 5", 2)
    for c, (task, after) in enumerate(zip(tasks, trained, strict=True)):
        (chosen,) = samples("seed 5", 2, f"c{c}", len(rows[c]), 4, 1)
        assert len(chosen) == (3, 4)[c]
        own = noise_of(noise, f"c{c}", learning(states[c]), 0)
        picked = [rows[c][i] for i in chosen]
        expected = numpys_step(base, states[c], picked, len(chosen), clip, own)
        for name in task.state.adapter:
            found = after.state.memory[f"control.{name}"].double().numpy()
            scale = np.abs(expected[f"adapter.{name}"]).max()
            np.testing.assert_allclose(
                found, expected[f"adapter.{name}"], rtol=1e-4, atol=1e-5 * scale
            )
        mean = np.mean([alone(base, states[c], row)[0] for row in picked])
        assert after.losses == pytest.approx([mean], rel=1e-6), "rows count alike, however long"


def even(client: int, rows: int) -> list[Example]:
    """Rows of one length, of which the mean over rows is the mean over tokens."""
    generator = torch.Generator().manual_seed(client)
    return [
        Example(tuple(torch.randint(3, 60, (9,), generator=generator).tolist()), 4)
        for _ in range(rows)
    ]


@pytest.mark.parametrize("strategy", [FedAvg(), FedProx(0.1)])
def test_little_noise_and_a_wide_clip_are_ordinary_training_without_a_clip(strategy):
    base = base_of("mixtral")
    tasks = [Task(f"c{c}", grown(newborn(base, f"c{c}", c), c), even(c, 3 + c)) for c in range(2)]
    plain = LocalTraining(
        steps=3, batch=9, learning_rate=1e-3, optimiser=AdamW(epsilon=1e-5, clip=0.0)
    )
    private = replace(
        plain, dp_sgd=DPSGD(1e3, 1e-13), optimiser=replace(plain.optimiser, clip=0.01)
    )
    ours, theirs = (
        train_cohort(base, tasks, training, strategy, 0, 1, 2, 0) for training in (private, plain)
    )
    for one, other, task in zip(ours, theirs, tasks, strict=True):
        assert one.losses == pytest.approx(other.losses, rel=1e-5)
        start = learning(task.state)
        for name, value in learning(one.state).items():
            torch.testing.assert_close(value, learning(other.state)[name], rtol=1e-5, atol=2e-5)
            assert not torch.equal(value, start[name])


@pytest.mark.parametrize("strategy", [FedAvg(), FedProx(0.1), Scaffold()])
def test_a_cohort_is_its_clients_one_by_one(strategy):
    """Of different numbers of rows, over two rounds of which some miss the first; optimisers kept."""
    base = base_of("mixtral")
    training = LocalTraining(
        steps=2, batch=4, learning_rate=1e-3, keep_optimiser=True, dp_sgd=DPSGD(0.1, 0.5)
    )
    rows, early = (3, 8, 5), {"c0", "c1"}
    tasks = []
    for c, count in enumerate(rows):
        state = newborn(base, f"c{c}", c % 2)
        memory = strategy.birth(state.adapter) if isinstance(strategy, Scaffold) else {}
        tasks.append(Task(f"c{c}", replace(state, memory=memory), examples(c, count), memory))

    def rounds(group):
        present = [t for t in group if t.client in early]
        first = train_cohort(base, present, training, strategy, 0, 1, 2, 0) if present else []
        states = {t.client: done.state for t, done in zip(present, first, strict=True)}
        group = [replace(t, state=states.get(t.client, t.state)) for t in group]
        return train_cohort(base, group, training, strategy, 0, 2, 2, 0)

    together = rounds(tasks)
    assert [steps_of(own.state.memory) for own in together] == [4, 4, 2]
    for task, ours in zip(tasks, together, strict=True):
        (theirs,) = rounds([task])
        assert ours.losses == pytest.approx(theirs.losses, rel=1e-5)
        for name, value in learning(ours.state).items():
            torch.testing.assert_close(value, learning(theirs.state)[name], rtol=1e-5, atol=2e-5)


@given(seed=st.integers(0, 999), clip=st.floats(1e-3, 10), scale=st.floats(1e-3, 1e3))
@hypotheses(max_examples=60, deadline=None)
def test_a_replaced_row_moves_the_sum_by_two_norms_at_most(seed, clip, scale):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (6, 3, 4), "b": (6,)}
    one = {n: scale * torch.randn(s, generator=generator) for n, s in shapes.items()}
    other = {n: v.clone() for n, v in one.items()}
    for value in other.values():
        value[4] = -value[4] if seed % 2 else 7 * torch.randn(value[4].shape, generator=generator)
    sums = [clipped_sums(g, clip, 2) for g in (one, other)]
    change = {n: sums[0][n] - sums[1][n] for n in shapes}
    assert not any(v[0].any() for v in change.values()), "the other client's sum stays"
    norm = math.sqrt(sum(float(v[1].square().sum()) for v in change.values()))
    assert 0 < norm <= 2 * clip * (1 + 1e-9)
    own = math.sqrt(sum(float(v[4].double().square().sum()) for v in one.values()))
    if seed % 2:
        assert norm == pytest.approx(2 * min(clip, own)), "and an opposite row by all of that"


def test_a_replaced_example_moves_the_sum_by_two_norms_at_most():
    base, states = exact("mixtral", Graft(rank=2), LoRA(2, 4.0))
    rows, others = examples(0), examples(1)
    changed = [others[0], *rows[1:]]
    for clip in (1e-3, 0.1, 1e3):
        sums = []
        for own in (rows, changed):
            stage = stage_of(base, states[:1], [own], [[list(range(5))]])
            _, gradients = stage.row_gradients(0, with_leaves(states[:1]))
            sums.append(clipped_sums(gradients, clip, 1))
        square = sum(float((sums[0][n] - sums[1][n]).square().sum()) for n in sums[0])
        assert 0 < math.sqrt(square) <= 2 * clip


def test_a_row_without_a_gradient_is_clipped_to_nothing():
    assert not clipped_sums({"a": torch.zeros(2, 3)}, 1.0, 1)["a"].any()


def test_noise_has_its_deviation_and_is_a_function_of_key_round_client_and_step():
    like = {"a": torch.zeros(60, 70), "b": torch.zeros(30)}

    def drawn(key="k", round_=4, client="c", step=2, first=0):
        own = noise_of(RowNoise(DPSGD(2.0, 1.5), key, round_, first), client, like, step)
        return np.concatenate([own[n].ravel() for n in like])

    assert np.array_equal(drawn(), drawn())
    assert np.array_equal(drawn(), drawn(step=0, first=2))
    different = [drawn(), drawn("l"), drawn(round_=5), drawn(client="d"), drawn(step=3)]
    assert abs(np.corrcoef(different)[np.triu_indices(5, 1)]).max() < 0.08
    for noise in different:
        assert noise.std() == pytest.approx(3.0, rel=0.04)
        assert abs(noise.mean()) < 0.2
    pair = {n: torch.zeros(6, *v.shape) for n, v in like.items()}
    both = RowNoise(DPSGD(2.0, 1.5), "k", 4).mean(pair, ["d", "c"], [1, 3], 2)
    theirs = np.concatenate([both[n][1].numpy().ravel() for n in like])
    np.testing.assert_allclose(theirs, drawn() / 3, rtol=1e-5)


def test_rows_are_drawn_anew_every_step():
    """Sizes and frequencies of samples without replacement, and of rows that two steps share."""
    steps = samples("k", 1, "c", 20, 5, 4000)
    assert {len(set(own)) for own in steps} == {5}
    counts = np.bincount(np.concatenate(steps), minlength=20)
    assert abs(counts - 1000).max() < 4.5 * math.sqrt(4000 * 0.25 * 0.75)
    shared = [len(set(a) & set(b)) for a, b in pairwise(steps)]
    assert np.mean(shared) == pytest.approx(5 * 5 / 20, abs=0.06)
    assert steps[:7] == samples("k", 1, "c", 20, 5, 7)
    for other in (("l", 1, "c"), ("k", 2, "c"), ("k", 1, "d")):
        assert samples(*other, 20, 5, 7) != steps[:7]
    assert [sorted(own) for own in samples("k", 1, "c", 3, 5, 2)] == [[0, 1, 2]] * 2


@pytest.mark.parametrize(
    ("rows", "batch", "steps", "noise"), [(1000, 4, 100, 1.0), (60, 8, 30, 2.0), (10, 9, 3, 4.0)]
)
def test_epsilon_is_the_librarys(rows, batch, steps, noise):
    """Another row in the place of one moves the sum by 2 · clip: half the noise per unit."""
    accountant = dp_accounting.rdp.RdpAccountant(
        neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_ONE
    )
    accountant.compose(
        dp_accounting.SampledWithoutReplacementDpEvent(
            rows, batch, dp_accounting.GaussianDpEvent(noise / 2)
        ),
        steps,
    )
    plain = dp_accounting.get_epsilon_gaussian(noise / 2 / math.sqrt(steps), 1e-5)
    found = row_epsilon(DPSGD(3.0, noise), rows, batch, steps)
    assert found == min(accountant.get_epsilon(1e-5), plain)
    assert row_epsilon(DPSGD(3.0, noise), batch, batch, steps) == plain
    assert row_epsilon(DPSGD(3.0, noise), 1, batch, steps) == plain
    assert row_epsilon(DPSGD(3.0, noise), rows, batch, 0) == 0.0


@pytest.fixture
def private(settings) -> FederateSettings:
    return replace(
        settings,
        graft=Graft(SameExpert(1), rank=2),
        local=LocalTraining(steps=2, batch=2, dp_sgd=DPSGD(0.5, 2.0, 1e-3)),
    )


def metrics(path: Path, model: str) -> list[dict]:
    lines = map(json.loads, (path / "metrics.jsonl").read_text("utf-8").splitlines())
    return [line for line in lines if line["model"] == model]


def test_epsilon_of_every_client_is_told_and_written(private, tmp_path):
    """Ten rows each, two steps in every round that a client was in; the finish counts too."""
    notes: list[str] = []
    some = replace(
        private,
        fraction=0.6,
        privacy=Privacy(0.5, 2.0),
        finish=Finish(2, private.local, newcomers_only=False),
    )
    with RunDirectory.open(tmp_path / "run", dump(some), {"method": "m", "seed": 0}) as directory:
        federate(some, directory, tell=notes.append)
    trained = [(line["round"], line["client"]) for line in metrics(tmp_path / "run", "training")]
    lines = metrics(tmp_path / "run", "dp-sgd")
    assert [(line["round"], line["client"]) for line in lines] == trained
    assert len(trained) == 3 * 2 + 2 * 3
    taken = dict.fromkeys(("apples", "pears", "plums"), 0)
    for line in lines:
        taken[line["client"]] += 2
        expected = row_epsilon(private.local.dp_sgd, 10, 2, taken[line["client"]])
        assert (line["epsilon"], line["delta"], line["secret"]) == (expected, 1e-3, False)
    last = {line["client"]: line["epsilon"] for line in lines}
    told = ", ".join(f"{last[n]:.4g} ({n})" for n in ("apples", "pears", "plums"))
    assert notes[-1] == f"round 5: ε of a row = {told} at δ = 0.001"
    write_report([tmp_path / "run"], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text("utf-8")
    assert f"<td>a row</td><td>{max(last.values()):.3g}</td><td>0.001</td>" in page
    assert "<td>a client</td>" in page


@pytest.mark.parametrize("writes", now_and_then([9], [5, 14]))
def test_an_interrupted_run_ends_with_the_same_bytes(private, tmp_path, monkeypatch, writes):
    rich = replace(
        private,
        strategy=Scaffold(0.6),
        fraction=0.6,
        local=replace(private.local, keep_optimiser=True),
        personal=LoRA(2, 4.0, ("o_proj",)),
        finish=Finish(2, private.local, newcomers_only=False),
    )
    run(rich, tmp_path / "whole")
    with stopped_after(writes, monkeypatch, WRITES[:2]):
        run(rich, tmp_path / "cut")
    run(rich, tmp_path / "cut")
    whole, cut = files_of(tmp_path / "whole"), files_of(tmp_path / "cut")
    assert whole.keys() == cut.keys()
    assert [name for name in whole if whole[name] != cut[name]] == []


def test_a_secret_decides_noise_and_rows_and_is_written_nowhere(private, tmp_path, monkeypatch):
    short = replace(private, rounds=1)
    run(short, tmp_path / "seed")
    monkeypatch.setenv(KEY, "correct horse battery staple")
    run(short, tmp_path / "secret")
    assert all(line["secret"] for line in metrics(tmp_path / "secret", "dp-sgd"))
    seed, secret = (metrics(tmp_path / name, "training") for name in ("seed", "secret"))
    assert any(a["losses"][0] != b["losses"][0] for a, b in zip(seed, secret, strict=True))
    written = [f.read_bytes() for f in (tmp_path / "secret").rglob("*") if f.is_file()]
    assert len(written) >= 10
    assert not any(b"battery" in content for content in written)


@pytest.mark.parametrize("kind", SELECTIONS)
def test_a_selection_that_looks_at_rows_is_refused(kind):
    selection = SELECTIONS[kind]()
    if kind in ("random", "same"):
        DP.check(selection)
        return
    with pytest.raises(PomonaError, match=rf'{type(selection).__name__} .*"random" or "same"'):
        DP.check(selection)


@pytest.mark.parametrize(
    ("made", "complaint"),
    [
        (lambda _: DPSGD(0.0, 1.0), "dp_sgd clip 0.0 is not positive"),
        (lambda _: DPSGD(math.inf, 1.0), "dp_sgd clip inf is not positive"),
        (lambda _: DPSGD(1.0, 0.0), "dp_sgd noise 0.0 is not positive"),
        (lambda _: DPSGD(1.0, math.nan), "dp_sgd noise nan is not positive"),
        (lambda _: DPSGD(1.0, 1.0, 0.0), "dp_sgd delta 0.0 is not between 0 and 1"),
        (lambda _: DPSGD(1.0, 1.0, 1.0), "dp_sgd delta 1.0 is not between 0 and 1"),
        (lambda _: LocalTraining(epochs=1, dp_sgd=DP), "there are no epochs; leave epochs out"),
        (
            lambda s: replace(s, graft=Graft(Reconstruction())),
            'looking at the rows without noise, .* use graft.selection "random" or "same"',
        ),
        (lambda s: replace(s, newcomers=("pears",)), "local and finish.training see the same rows"),
        (
            lambda s: replace(s, finish=Finish(training=LocalTraining(dp_sgd=DP))),
            "their dp_sgd or their batch differ",
        ),
        (
            lambda s: replace(s, finish=Finish(training=replace(s.local, batch=3))),
            "their dp_sgd or their batch differ",
        ),
        (
            lambda s: replace(s, local=LocalTraining(), finish=Finish(training=s.local)),
            "their dp_sgd or their batch differ",
        ),
        (
            lambda s: replace(s, early_stop=EarlyStop()),
            "early_stop tells the loss of rows without noise",
        ),
        (
            lambda s: replace(s, strategy=Tilted()),
            "Tilted is told the loss of rows without noise",
        ),
        (
            lambda s: replace(s, ranks={"pears": 1}, strategy=FLoRA()),
            "noise on every direction of an adapter, .* leave ranks or dp_sgd out",
        ),
    ],
)
def test_what_does_not_go_together_is_told(private, made, complaint):
    with pytest.raises(PomonaError, match=complaint):
        made(private)


def test_without_rounds_only_the_finish_counts(private, tmp_path):
    new = {"rounds": 0, "warm_start": tmp_path, "local": LocalTraining()}
    made = replace(private, **new, finish=Finish(training=private.local))
    assert made.last_round == 20
    with pytest.raises(PomonaError, match=r'use graft\.selection "random" or "same"'):
        replace(made, graft=Graft(), finish=Finish(training=private.local))
    assert replace(made, graft=Graft(RandomExpert())).graft.selection == RandomExpert()


def test_the_library_and_the_key_are_looked_for_at_once(private, monkeypatch):
    monkeypatch.setenv(KEY, "short")
    with pytest.raises(PomonaError, match=f"{KEY} is too short"):
        replace(private, rounds=4)
    monkeypatch.delenv(KEY)
    monkeypatch.setitem(sys.modules, "dp_accounting.rdp", None)
    with pytest.raises(PomonaError, match=r"pip install 'pomona\[privacy\]'"):
        replace(private, rounds=4)


def test_a_recipe_says_it_in_a_table(tmp_path):
    text = (
        'model = "org/name"\n[data]\ntrain = "t"\ntest = "t"\n[local]\nbatch = 8\n[local.dp_sgd]\n'
    )
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(text + "clip = 1\nnoise = 0.5\ndelta = 1e-6\n", encoding="utf-8")
    made = read_recipe(recipe, FederateSettings)
    assert made.local == LocalTraining(batch=8, dp_sgd=DPSGD(1.0, 0.5, 1e-6))
    recipe.write_text(dump(made), encoding="utf-8")
    assert read_recipe(recipe, FederateSettings) == made
    for table, complaint in (
        ("clip = 1.0\n", 'dp_sgd: the key "noise" is missing'),
        ("clip = 1.0\nnoise = 0\n", "dp_sgd noise 0.0 is not positive"),
        ("clip = 1.0\nnoise = 1.0\nepsilon = 3\n", 'unknown key "epsilon"; valid keys are clip'),
        ('clip = 1.0\nnoise = 1.0\n[graft]\nselection = "usage"\n', "Usage chooses experts by"),
    ):
        recipe.write_text(text + table, encoding="utf-8")
        with pytest.raises(PomonaError, match=complaint):
            read_recipe(recipe, FederateSettings)
