"""Every rule of the server against a few lines of NumPy in float64, and the laws it must keep."""

import copy
import itertools
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pomona.errors import PomonaError
from pomona.federation.strategies import (
    STRATEGIES,
    Corrects,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedYogi,
    FlexLoRA,
    Krum,
    Median,
    ServerState,
    Tilted,
    TrimmedMean,
)
from pomona.federation.strategies.flexlora import truncated_product
from pomona.federation.strategies.krum import squared_distances
from pomona.federation.update import Update
from pomona.models.weights import read_tensors, write_tensors

SHAPES = {"q.lora_A": (3, 8), "q.lora_B": (6, 3), "v.lora_A": (3, 8), "v.lora_B": (4, 3)}


def tensors(seed: int, shapes=SHAPES, scale: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: scale * torch.randn(s, generator=generator) for n, s in shapes.items()}


def updates(count: int, seed: int = 0, shapes=SHAPES) -> list[Update]:
    """Clients whose rows, tensors and losses all differ."""
    return [
        Update(f"c{i}", 7 * i + 3, tensors(100 * seed + i, shapes), 4.0 + 0.1 * i)
        for i in range(count)
    ]


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def numpy_mean(sent, name):
    rows = np.array([u.rows for u in sent], dtype=float)
    stack = np.stack([u.shared[name].double().numpy() for u in sent])
    return np.tensordot(rows / rows.sum(), stack, 1)


def test_fedavgm_is_its_two_lines():
    strategy = FedAvgM(beta=0.8, learning_rate=0.5)
    state = strategy.init(tensors(9))
    theta = {n: v.double().numpy() for n, v in state.shared.items()}
    velocity = dict.fromkeys(theta, 0.0)
    for round_ in range(4):
        sent = updates(3, round_)
        state = strategy.aggregate(state, sent)
        for name in theta:
            velocity[name] = 0.8 * velocity[name] + numpy_mean(sent, name) - theta[name]
            theta[name] = theta[name] + 0.5 * velocity[name]
            np.testing.assert_allclose(state.shared[name], theta[name], rtol=2e-6, atol=2e-6)


def losses(round_: int) -> list[float]:
    return [4.5 + 0.3 * i * (-1) ** (i + round_) for i in range(4)]


def test_tilted_weighs_by_the_exponential_of_what_was_heard():
    strategy = Tilted(tilt=3.0, keep=0.6, learning_rate=1.7)
    state = strategy.init(tensors(9))
    theta = {n: v.double().numpy() for n, v in state.shared.items()}
    heard: dict[str, float] = {}
    for round_ in range(4):
        sent = [
            replace(u, loss=loss)
            for u, loss in zip(updates(4, round_), losses(round_), strict=True)
        ][round_ % 2 :]  # not everybody is always there
        state = strategy.aggregate(state, sent)
        for u in sent:
            heard[u.client] = 0.6 * heard[u.client] + 0.4 * u.loss if u.client in heard else u.loss
        weight = np.array([u.rows * np.exp(3.0 * heard[u.client]) for u in sent])
        for name in theta:
            stack = np.stack([u.shared[name].double().numpy() for u in sent])
            mean = np.tensordot(weight / weight.sum(), stack, 1)
            theta[name] = theta[name] + 1.7 * (mean - theta[name])
            np.testing.assert_allclose(state.shared[name], theta[name], rtol=2e-6, atol=2e-6)
    assert {n: float(v) for n, v in state.memory.items()} == pytest.approx(
        {f"loss/{client}": loss for client, loss in heard.items()}
    )


def test_tilted_by_nothing_is_fedavg_bit_for_bit():
    sent = [replace(u, loss=loss) for u, loss in zip(updates(4), losses(0), strict=True)]
    strategy, start = Tilted(tilt=0.0), tensors(9)
    found = strategy.aggregate(strategy.init(start), sent)
    assert same(found.shared, FedAvg().aggregate(ServerState(start), sent).shared)
    assert strategy.aggregate(found, []) is found


def test_tilted_stands_any_loss():
    sent = [replace(u, loss=loss) for u, loss in zip(updates(3), (1.0, 1e6, 2.0), strict=True)]
    strategy = Tilted()
    found = strategy.aggregate(strategy.init(tensors(9)), sent).shared
    for name, value in found.items():
        torch.testing.assert_close(value, sent[1].shared[name])


def test_a_client_tells_the_mean_of_its_losses_and_it_is_in_its_message():
    told = Tilted().told([1.0, 2.0, 4.5])
    assert told == 2.5
    update = replace(updates(1)[0], loss=told)
    assert set(update.message) == {*update.shared, "loss"}
    assert float(update.message["loss"]) == 2.5
    assert set(replace(update, loss=None).message) == set(SHAPES)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"tilt": -1.0}, "Tilted tilt -1.0 is not 0 or more"),
        ({"tilt": math.inf}, "Tilted tilt inf is not 0 or more"),
        ({"keep": 1.0}, "Tilted keep 1.0 is not a share below 1"),
        ({"learning_rate": 0.0}, "Tilted learning_rate 0.0 is not positive"),
    ],
)
def test_tilted_is_refused_what_makes_no_sense(given, said):
    with pytest.raises(PomonaError, match=re.escape(said)):
        Tilted(**given)


@pytest.mark.parametrize(
    ("strategy", "second"),
    [
        (FedAdagrad(0.1, 0.05, beta1=0.0), lambda v, d: v + d**2),
        (FedAdagrad(0.1, 0.05, beta1=0.5), lambda v, d: v + d**2),
        (FedAdam(0.1, 0.05, 0.7, 0.8), lambda v, d: 0.8 * v + 0.2 * d**2),
        (FedYogi(0.1, 0.05, 0.7, 0.8), lambda v, d: v - 0.2 * d**2 * np.sign(v - d**2)),
    ],
)
def test_adaptive_servers_are_the_papers_algorithm(strategy, second):
    state = strategy.init(tensors(9))
    theta = {n: v.double().numpy() for n, v in state.shared.items()}
    m, v = dict.fromkeys(theta, 0.0), dict.fromkeys(theta, 0.05**2)
    for round_ in range(4):
        sent = updates(3, round_)
        state = strategy.aggregate(state, sent)
        for name in theta:
            delta = numpy_mean(sent, name) - theta[name]
            m[name] = strategy.beta1 * m[name] + (1 - strategy.beta1) * delta
            v[name] = second(v[name], delta)
            theta[name] = theta[name] + 0.1 * m[name] / (np.sqrt(v[name]) + 0.05)
            np.testing.assert_allclose(state.shared[name], theta[name], rtol=5e-6, atol=5e-6)


def test_the_adaptive_three_are_three():
    """From the second round on: the first moves all of them from the same v."""
    finals = []
    for strategy in (FedAdagrad(0.1, 0.1, 0.9), FedAdam(0.1, 0.1), FedYogi(0.1, 0.1)):
        state = strategy.init(tensors(9))
        for round_ in range(3):
            state = strategy.aggregate(state, updates(3, round_))
        finals.append(state.shared["q.lora_A"])
    for one, other in itertools.combinations(finals, 2):
        assert (one - other).abs().max() > 1e-4


values = st.floats(-(2.0**100), 2.0**100, width=32)


@given(st.lists(st.tuples(values, st.integers(1, 999)), min_size=1, max_size=5), values)
@settings(max_examples=200, deadline=None)
def test_fedavgm_without_momentum_is_fedavg_bit_for_bit(sent, start):
    given_ = [Update(f"c{i}", n, {"w": torch.tensor([x])}) for i, (x, n) in enumerate(sent)]
    plain = FedAvg().init({"w": torch.tensor([start])})
    state = FedAvgM(beta=0.0, learning_rate=1.0).init(plain.shared)
    for _ in range(2):
        state = FedAvgM(beta=0.0, learning_rate=1.0).aggregate(state, given_)
        plain = FedAvg().aggregate(plain, given_)
        assert torch.equal(state.shared["w"], plain.shared["w"])


@given(st.lists(values, min_size=1, max_size=9))
@settings(max_examples=200, deadline=None)
def test_a_median_is_numpys_and_lies_within_the_clients(xs):
    sent = [Update(f"c{i}", i + 1, {"w": torch.tensor([x])}) for i, x in enumerate(xs)]
    found = Median().aggregate(Median().init({"w": torch.zeros(1)}), sent).shared["w"]
    assert min(xs) <= found.item() <= max(xs)
    assert found.item() == np.float32(np.median(np.array(xs, dtype=np.float64)))


@given(st.lists(values, min_size=1, max_size=12), st.floats(0, 0.49))
@settings(max_examples=200, deadline=None)
def test_a_trimmed_mean_is_scipys_and_lies_within_what_it_keeps(xs, trim):
    from scipy.stats import trim_mean

    sent = [Update(f"c{i}", i + 1, {"w": torch.tensor([x])}) for i, x in enumerate(xs)]
    strategy = TrimmedMean(trim)
    found = strategy.aggregate(strategy.init({"w": torch.zeros(1)}), sent).shared["w"].item()
    exact = np.array(xs, dtype=np.float64)
    np.testing.assert_allclose(
        found, trim_mean(exact, trim + 1e-12), rtol=1e-6, atol=1e-12 * abs(exact).max() + 2e-45
    )
    kept = sorted(xs)[int(trim * len(xs)) : len(xs) - int(trim * len(xs))]
    assert kept[0] <= found <= kept[-1]


def test_trimming_cuts_the_share_it_says_whatever_binary_fractions_say():
    """0.29 · 100 is 28.999…96 in binary; 29 clients go at either end."""
    sent = [Update(f"c{i:03}", 1, {"w": torch.tensor([float(i**3)])}) for i in range(100)]
    found = TrimmedMean(0.29).aggregate(ServerState({}), sent).shared["w"]
    assert found.item() == pytest.approx(np.mean(np.arange(100.0)[29:71] ** 3))


def test_without_trimming_every_client_counts_the_same():
    sent = updates(4)
    found = TrimmedMean(0.0).aggregate(ServerState({}), sent).shared
    for name, value in found.items():
        plain = np.mean([u.shared[name].double().numpy() for u in sent], axis=0)
        np.testing.assert_allclose(value, plain, rtol=1e-6, atol=1e-7)


def brute_krum(sent, malicious):
    """The paper's definition, one client after the other."""
    vectors = [
        np.concatenate([u.shared[n].double().numpy().ravel() for n in sorted(u.shared)])
        for u in sent
    ]
    scores = []
    for i, own in enumerate(vectors):
        distances = sorted(((own - v) ** 2).sum() for j, v in enumerate(vectors) if j != i)
        scores.append(sum(distances[: len(sent) - malicious - 2]))
    return np.argsort(scores)


@pytest.mark.parametrize(("clients", "malicious"), [(3, 0), (5, 1), (7, 0), (7, 2), (9, 1)])
@pytest.mark.parametrize("seed", range(3))
def test_krum_returns_one_update_and_multi_krum_the_mean_of_the_best(clients, malicious, seed):
    sent = updates(clients, seed)
    order = brute_krum(sent, malicious)
    state = Krum(malicious).init(tensors(9))
    found = Krum(malicious).aggregate(state, iter(sent)).shared
    if clients > 3:  # of three, two are each other's nearest and have one score
        assert same(found, sent[order[0]].shared)
    assert any(same(found, u.shared) for u in sent)
    several = Krum(malicious, chosen=clients - malicious).aggregate(state, sent).shared
    if malicious == 0:
        order = np.arange(clients)
    for name, value in several.items():
        best = [sent[i].shared[name].double().numpy() for i in order[: clients - malicious]]
        np.testing.assert_allclose(value, np.mean(best, axis=0), rtol=1e-6, atol=1e-6)


def test_distances_are_over_all_tensors_together():
    sent = updates(4)
    flat = torch.stack(
        [torch.cat([u.shared[n].flatten() for n in sorted(u.shared)]) for u in sent]
    ).double()
    torch.testing.assert_close(
        squared_distances(sent), torch.cdist(flat, flat).square(), rtol=1e-9, atol=1e-9
    )


@given(
    seed=st.integers(0, 50),
    wild=st.sampled_from([1e6, -1e30, float("nan"), float("inf"), float("-inf")]),
    place=st.integers(0, 6),
)
@settings(max_examples=40, deadline=None)
@pytest.mark.parametrize("strategy", [Median(), TrimmedMean(0.2), Krum(1), Krum(1, chosen=3)])
def test_one_wild_client_does_not_carry_the_others_away(strategy, seed, wild, place):
    """What is returned stays within the honest clients; plain averaging does not."""
    honest = updates(6, seed)
    liar = Update("c9", 10**9, {n: torch.full(s, wild) for n, s in SHAPES.items()})
    sent = [*honest[:place], liar, *honest[place:]]
    found = strategy.aggregate(strategy.init(tensors(9)), sent).shared
    carried = FedAvg().aggregate(FedAvg().init(tensors(9)), sent).shared
    for name, value in found.items():
        stack = torch.stack([u.shared[name] for u in honest])
        assert (value <= stack.amax(0) + 1e-6).all()
        assert (value >= stack.amin(0) - 1e-6).all()
        assert not (carried[name].abs() < 100).all()


def dense_mean(sent, name):
    rows = sum(u.rows for u in sent)
    pairs = [(u.rows, u.shared[f"{name}.lora_B"], u.shared[f"{name}.lora_A"]) for u in sent]
    return sum(n / rows * b.double().numpy() @ a.double().numpy() for n, b, a in pairs)


def ranked(ranks, seed=0):
    return [
        Update(
            f"c{i}",
            5 * i + 2,
            tensors(10 * seed + i, {"q.lora_A": (r, 8), "q.lora_B": (6, r)}),
        )
        for i, r in enumerate(ranks)
    ]


@pytest.mark.parametrize("ranks", [(3, 3), (3, 3, 3, 3), (1, 2, 5), (1, 1, 1), (3,), (2, 7)])
def test_flexlora_is_the_truncated_svd_of_the_dense_mean(ranks):
    sent = ranked(ranks)
    start = tensors(50, {"q.lora_A": (3, 8), "q.lora_B": (6, 3)})
    found = FlexLoRA().aggregate(FlexLoRA().init(start), iter(sent)).shared
    u, sigma, v = np.linalg.svd(dense_mean(sent, "q"), full_matrices=False)
    for k in range(3):  # sign by the largest entry of every row of A
        sign = np.sign(v[k, np.abs(v[k]).argmax()])
        np.testing.assert_allclose(found["q.lora_A"][k], sign * v[k], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(
            found["q.lora_B"][:, k], sign * sigma[k] * u[:, k], rtol=1e-4, atol=1e-5
        )


def test_flexlora_gives_back_what_fits_the_rank_and_no_dense_mean_of_factors_does():
    one = tensors(1)
    sent = [Update(f"c{i}", i + 1, one) for i in range(3)]
    found = FlexLoRA().aggregate(ServerState(tensors(2)), sent).shared
    for name in "qv":
        product = found[f"{name}.lora_B"] @ found[f"{name}.lora_A"]
        torch.testing.assert_close(
            product, one[f"{name}.lora_B"] @ one[f"{name}.lora_A"], rtol=1e-5, atol=1e-5
        )
    differ = updates(4)
    ours = FlexLoRA().aggregate(ServerState(tensors(2)), differ).shared
    plain = FedAvg().aggregate(ServerState(tensors(2)), differ).shared

    def error(shared):
        product = shared["q.lora_B"].double() @ shared["q.lora_A"].double()
        return np.linalg.norm(product.numpy() - dense_mean(differ, "q"))

    assert error(ours) < 0.8 * error(plain)


def test_rows_of_a_that_nobody_filled_can_still_learn():
    """Ranks 1 of the clients make 2 of the server's 3; B is zero where A is the old row."""
    start = tensors(50, {"q.lora_A": (3, 8), "q.lora_B": (6, 3)})
    found = FlexLoRA().aggregate(ServerState(start), ranked((1, 1))).shared
    assert torch.equal(found["q.lora_A"][2], start["q.lora_A"][2])
    assert torch.equal(found["q.lora_B"][:, 2], torch.zeros(6))
    product = found["q.lora_B"].double() @ found["q.lora_A"].double()
    np.testing.assert_allclose(product, dense_mean(ranked((1, 1)), "q"), rtol=1e-5, atol=1e-6)


def test_flexlora_survives_factors_that_are_zero():
    """The first update of a client that could not learn: B is zero, and A stays usable."""
    sent = [
        Update(u.client, u.rows, {**u.shared, "q.lora_B": torch.zeros(6, 3)}) for u in updates(3)
    ]
    found = FlexLoRA().aggregate(ServerState(tensors(2)), sent).shared
    assert torch.equal(found["q.lora_B"], torch.zeros(6, 3))
    assert (found["q.lora_A"].norm(dim=1) > 0.5).all()


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_flexlora_knows_no_order_even_where_an_svd_leaves_everything_open(order):
    """Of a product that is zero any basis would do; it is the same one bit for bit."""
    sent = [
        Update(u.client, u.rows, {**u.shared, "q.lora_B": torch.zeros(6, 3)}) for u in updates(3)
    ]
    forth = FlexLoRA().aggregate(ServerState(tensors(2)), sent).shared
    assert same(
        FlexLoRA().aggregate(ServerState(tensors(2)), [sent[i] for i in order]).shared, forth
    )


@given(
    out=st.integers(1, 9),
    stacked=st.integers(1, 12),
    into=st.integers(1, 9),
    rank=st.integers(1, 6),
)
@settings(max_examples=60, deadline=None)
def test_a_truncated_product_is_the_best_of_its_rank(out, stacked, into, rank):
    generator = torch.Generator().manual_seed(out * 1000 + stacked * 100 + into * 10 + rank)
    b = torch.randn(out, stacked, generator=generator, dtype=torch.float64)
    a = torch.randn(stacked, into, generator=generator, dtype=torch.float64)
    a_RI, b_OR = truncated_product(b, a, rank)
    sigma = torch.linalg.svdvals(b @ a)
    left = torch.linalg.matrix_norm(b @ a - b_OR @ a_RI)
    torch.testing.assert_close(left, sigma[rank:].square().sum().sqrt(), rtol=1e-8, atol=1e-10)
    kept = len(a_RI)
    torch.testing.assert_close(
        a_RI @ a_RI.mT, torch.eye(kept, dtype=torch.float64), rtol=1e-9, atol=1e-9
    )


def test_flexlora_factorises_every_expert_by_itself():
    """Fused experts [E, R, in] are what E projections are, bit for bit apart from the batched routines."""
    shapes = {"e.lora_A": (4, 3, 8), "e.lora_B": (4, 6, 3)}
    sent = [Update(f"c{i}", i + 2, tensors(i, shapes)) for i in range(3)]
    found = FlexLoRA().aggregate(ServerState(tensors(9, shapes)), sent).shared
    for expert in range(4):
        own = [
            Update(
                u.client, u.rows, {n.replace("e", "q", 1): v[expert] for n, v in u.shared.items()}
            )
            for u in sent
        ]
        product = found["e.lora_B"][expert].double() @ found["e.lora_A"][expert].double()
        u, sigma, v = np.linalg.svd(dense_mean(own, "q"), full_matrices=False)
        best = u[:, :3] * sigma[:3] @ v[:3]
        np.testing.assert_allclose(product, best, rtol=1e-4, atol=1e-5)


def test_flexlora_averages_what_is_no_pair():
    shapes = {**SHAPES, "norm.weight": (5,), "k.lora_A": (2, 4)}
    sent = updates(3, shapes=shapes)
    found = FlexLoRA().aggregate(ServerState(tensors(2, shapes)), sent).shared
    plain = FedAvg().aggregate(ServerState(tensors(2, shapes)), sent).shared
    assert list(found) == list(shapes)
    for name in ("norm.weight", "k.lora_A"):
        assert torch.equal(found[name], plain[name])


def test_every_strategy_was_found():
    assert len(STRATEGIES) >= 11


def sent_by(strategy, clients, seed):
    """What clients send under a strategy: the shared tensors and, where it has any, its reports."""
    plain = updates(clients, seed)
    if isinstance(strategy, Corrects):
        for update, other in zip(plain, updates(clients, seed + 100), strict=True):
            update.shared.update(strategy.report(strategy.birth(other.shared), other.shared)[1])
    return plain


@pytest.mark.parametrize("kind", STRATEGIES)
@given(order=st.permutations(range(5)), seed=st.integers(0, 30))
@settings(max_examples=15, deadline=None)
def test_the_order_of_the_clients_is_irrelevant_round_after_round(kind, order, seed):
    strategy = STRATEGIES[kind]()
    forth = other = strategy.init(tensors(9))
    for round_ in range(2):
        sent = sent_by(strategy, 5, seed + round_)
        forth = strategy.aggregate(forth, sent)
        other = strategy.aggregate(other, [sent[i] for i in order])
    for name in forth.shared:
        torch.testing.assert_close(forth.shared[name], other.shared[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", STRATEGIES)
def test_a_state_that_went_through_a_file_goes_on_exactly(kind, tmp_path):
    strategy = STRATEGIES[kind]()
    state = strategy.aggregate(strategy.init(tensors(9)), sent_by(strategy, 4, 1))
    parts = {**{f"s/{n}": v for n, v in state.shared.items()}}
    parts |= {f"m/{n}": v for n, v in state.memory.items()}
    write_tensors(tmp_path / "s.safetensors", parts, {})
    back = read_tensors(tmp_path / "s.safetensors")
    again = ServerState(*({n[2:]: v for n, v in back.items() if n[:2] == p} for p in ("s/", "m/")))
    whole, resumed = (strategy.aggregate(s, sent_by(strategy, 4, 2)) for s in (state, again))
    assert same(whole.shared, {n: resumed.shared[n] for n in whole.shared})
    assert same(whole.memory, {n: resumed.memory[n] for n in whole.memory})


@pytest.mark.parametrize("kind", STRATEGIES)
def test_no_updates_leave_the_state_and_aggregating_leaves_what_it_was_given(kind):
    strategy = STRATEGIES[kind]()
    state = strategy.aggregate(strategy.init(tensors(9)), sent_by(strategy, 4, 1))
    nothing = strategy.aggregate(state, iter(()))
    assert same(nothing.shared, state.shared)
    assert same(nothing.memory, state.memory)
    sent = sent_by(strategy, 4, 2)
    kept = copy.deepcopy((state, sent))
    strategy.aggregate(state, sent)
    assert same(state.shared, kept[0].shared)
    assert same(state.memory, kept[0].memory)
    assert all(same(now.shared, then.shared) for now, then in zip(sent, kept[1], strict=True))


@pytest.mark.parametrize(
    ("made", "complaint"),
    [
        (lambda: FedAvgM(beta=1.0), r"FedAvgM beta 1.0 is not in \[0, 1\)"),
        (lambda: FedAvgM(learning_rate=0.0), "FedAvgM learning_rate 0.0 is not positive"),
        (lambda: FedAdagrad(tau=0.0), "FedAdagrad tau 0.0 is not positive"),
        (lambda: FedAdagrad(beta1=-0.1), "FedAdagrad beta1 -0.1 is not in"),
        (lambda: FedAdam(beta2=1.5), "FedAdam beta2 1.5 is not in"),
        (lambda: FedAdam(learning_rate=-1.0), "FedAdam learning_rate -1.0 is not positive"),
        (lambda: FedYogi(beta1=float("nan")), "FedYogi beta1 nan is not in"),
        (lambda: FedYogi(tau=float("nan")), "FedYogi tau nan is not positive"),
        (lambda: TrimmedMean(0.5), r"TrimmedMean trim 0.5 is not in \[0, 0.5\)"),
        (lambda: TrimmedMean(-0.1), "TrimmedMean trim -0.1 is not in"),
        (lambda: Krum(malicious=-1), "Krum malicious -1 is negative"),
        (lambda: Krum(chosen=0), "Krum chosen 0 is not positive"),
    ],
)
def test_settings_that_make_no_sense_are_named(made, complaint):
    with pytest.raises(PomonaError, match=complaint):
        made()


@pytest.mark.parametrize(
    ("strategy", "clients", "complaint"),
    [
        (Krum(1), 4, "Krum got 4 updates in a round, but malicious = 1 needs at least 5"),
        (Krum(0), 2, "Krum got 2 updates in a round, but malicious = 0 needs at least 3"),
        (Krum(1, chosen=5), 5, "malicious = 1 at most 4 can be chosen, not 5"),
    ],
)
def test_krum_with_too_few_clients_names_the_numbers(strategy, clients, complaint):
    with pytest.raises(PomonaError, match=complaint):
        strategy.aggregate(strategy.init(tensors(9)), updates(clients))
