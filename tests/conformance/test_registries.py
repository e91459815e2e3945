"""Every member of every registry keeps its protocol's promises, also one added tomorrow."""

import copy
from dataclasses import fields, is_dataclass

import pytest
import torch
from conftest import word_text
from families import FAMILIES
from transformers import AutoTokenizer

from pomona.data.examples import Example, collate, encode, encode_prompt
from pomona.data.formats import FORMATS, Auto, detect
from pomona.data.row import Row
from pomona.data.templates import TEMPLATES
from pomona.data.texts import encode_texts, sample_windows
from pomona.errors import PomonaError
from pomona.federation.partition import PARTITIONS
from pomona.federation.selection import SELECTIONS
from pomona.federation.strategies import STRATEGIES, Corrects, Penalises
from pomona.federation.update import Update
from pomona.models.dense import dense_family
from pomona.models.experts import find_expert_sites
from pomona.models.loading import load_model
from pomona.models.weights import Checkpoint
from pomona.recipe.registries import REGISTRIES
from pomona.reconstruction.calibrate import calibrate
from pomona.reconstruction.compensate import COMPENSATIONS
from pomona.reconstruction.ffn import dense_model
from pomona.reconstruction.plan import ExpertPlan, no_channels
from pomona.reconstruction.planners import PLANNERS, Calibration, TopChannels
from pomona.reconstruction.router import ROUTERS
from pomona.reconstruction.scores import SCORES, score_layers


@pytest.fixture(scope="module")
def dense(dense_dir):
    model = load_model(dense_dir, "float32").eval()
    checkpoint = Checkpoint.open(dense_dir)
    return dense_model(model, dense_family(checkpoint), checkpoint)


@pytest.fixture(scope="module")
def windows(dense_dir):
    tokenizer = AutoTokenizer.from_pretrained(dense_dir)
    texts = [[word_text(20 * domain + i, 40) for i in range(9)] for domain in range(3)]
    documents = [encode_texts(own, tokenizer) for own in texts]
    return [sample_windows(own, 6, 24, 0, str(i)) for i, own in enumerate(documents)]


def rows(count=40):
    return [Row(word_text(i, 4), "", word_text(i + 1, 2), "xyz"[i % 3]) for i in range(count)]


SHAPES = {"p.lora_A": (2, 4), "p.lora_B": (3, 2), "q.lora_A": (2, 3), "q.lora_B": (5, 2)}


def updates(strategy):
    """What four clients send: a pair for two projections, and what the strategy adds."""
    generator = torch.Generator().manual_seed(0)

    def values():
        return {n: torch.randn(shape, generator=generator) for n, shape in SHAPES.items()}

    sent = [Update(f"c{i}", i + 1, values(), 4.0 + i / 10) for i in range(4)]
    if isinstance(strategy, Corrects):
        for update in sent:
            update.shared.update(strategy.report(strategy.birth(update.shared), values())[1])
    return sent


def test_registries_were_all_found():
    assert len(REGISTRIES) == 9
    assert sum(map(len, REGISTRIES.values())) >= 36


@pytest.mark.parametrize(
    ("protocol", "kind"), [(p, k) for p, members in REGISTRIES.items() for k in members]
)
def test_a_member_is_a_frozen_dataclass_with_defaults_and_a_docstring(protocol, kind):
    member = REGISTRIES[protocol][kind]
    assert is_dataclass(member)
    assert member.__dataclass_params__.frozen
    made = member()
    assert made == member()
    assert not member.__doc__.startswith(f"{member.__name__}("), "dataclass's own, not a docstring"


@pytest.mark.parametrize("kind", SCORES)
def test_a_score_is_finite_and_follows_its_channel(kind, dense, windows):
    score = SCORES[kind]()
    stats = calibrate(dense, windows[0], score.gradients)
    score_LF = score_layers(score, stats, dense)
    assert score_LF.shape == (len(dense.ffns), dense.channels)
    assert score_LF.isfinite().all()
    assert score_LF.std(dim=1).min() > 0
    assert torch.equal(score_LF, score_layers(score, stats, dense))
    if kind == "random":
        return
    down_DF = dense.downs[0].weight.detach().double()
    order = torch.randperm(dense.channels, generator=torch.Generator().manual_seed(1))
    moved = copy.copy(stats[0])
    for field in fields(moved):
        value = getattr(moved, field.name)
        if isinstance(value, torch.Tensor) and value.ndim:
            object.__setattr__(moved, field.name, value[order])
    torch.testing.assert_close(score(moved, down_DF[:, order]), score_LF[0][order])


@pytest.fixture(scope="module")
def calibration(dense, windows):
    named = dict(zip("abc", windows, strict=True))
    stats = {name: calibrate(dense, own, gradients=True) for name, own in named.items()}
    return Calibration(dense, named, stats)


@pytest.mark.parametrize("kind", PLANNERS)
@pytest.mark.parametrize("score", SCORES)
def test_a_planner_gives_every_expert_its_width_and_shares_no_channel_twice(
    kind, score, calibration
):
    groups = [("a",), ("b", "c")]
    planner, width = PLANNERS[kind](), {"random-split": 32, "activation-clusters": 24}.get(kind, 16)
    plan, again = (planner(calibration, groups, SCORES[score](), width, 1, 3) for _ in range(2))
    assert plan.keep_LEW.shape == (2, 2, width)
    assert plan.groups == (("a",), ("b", "c"))
    assert (plan.keep_LEW.diff(dim=-1) > 0).all()
    assert plan.keep_LEW.min() >= 0
    assert plan.keep_LEW.max() < plan.channels == 64
    assert torch.equal(plan.keep_LEW, again.keep_LEW)
    assert torch.equal(plan.shared_LS, again.shared_LS)
    for layer, shared_S in zip(plan.keep_LEW, plan.shared_LS, strict=True):
        assert not set(shared_S.tolist()) & set(layer.flatten().tolist())
    assert planner.shared_channels(64, 2, width) == plan.shared_LS.shape[1]
    assert planner.divides == (kind != "top-channels")
    if planner.divides:
        for layer, shared_S in zip(plan.keep_LEW, plan.shared_LS, strict=True):
            assert sorted([*layer.flatten().tolist(), *shared_S.tolist()]) == list(range(64))
    for refused in (
        lambda: planner(calibration, groups, SCORES[score](), 65, 1, 3),
        lambda: planner.shared_channels(64, 2, 65),
    ):
        with pytest.raises(PomonaError):
            refused()


@pytest.mark.parametrize("kind", COMPENSATIONS)
def test_a_compensation_keeps_the_dense_columns_when_nothing_is_pruned(kind, dense, windows):
    everything = torch.arange(dense.channels).repeat(len(dense.ffns), 1, 1)
    plan = ExpertPlan(everything, (("a",),), dense.channels, no_channels(len(dense.ffns)))
    compensation = COMPENSATIONS[kind]()
    refits = compensation(dense, windows[0], plan, 0, range(len(dense.ffns)))
    assert len(refits) == len(dense.ffns)
    for refit, down in zip(refits, dense.downs, strict=True):
        torch.testing.assert_close(refit.column_DW, down.weight.detach(), rtol=1e-6, atol=1e-7)
        assert (refit.bias_D is not None) == compensation.biased
        assert refit.bias_D is None or refit.bias_D.abs().max() == 0


@pytest.mark.parametrize("kind", ROUTERS)
def test_a_router_gives_finite_rows_that_repeat(kind, calibration, windows):
    dense = calibration.dense
    plan = TopChannels()(calibration, [("a",), ("b",)], SCORES["wifv"](), 16, 1, 0)
    layers = range(len(dense.ffns))
    refits = [COMPENSATIONS["none"]()(dense, windows[e], plan, e, layers) for e in range(2)]
    columns = [[refit.column_DW for refit in layer] for layer in zip(*refits, strict=True)]

    def rows_of(some: range) -> list[torch.Tensor]:
        own = columns[some.start : some.stop]
        return ROUTERS[kind]()(dense, windows[:2], plan, own, some, 3)

    first, again = (rows_of(layers) for _ in range(2))
    assert len(first) == len(dense.ffns)
    for layer in layers:  # a few layers at a time are the same rows
        assert torch.equal(rows_of(range(layer, layer + 1))[0], first[layer])
    for row_ED, same_ED in zip(first, again, strict=True):
        assert row_ED.shape == (2, dense.downs[0].out_features)
        assert row_ED.isfinite().all()
        assert torch.equal(row_ED, same_ED)


@pytest.mark.parametrize("kind", SELECTIONS)
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("count", [1, 3, 4])
def test_a_selection_names_distinct_experts_per_site_and_leaves_the_model(kind, family, count):
    model = FAMILIES[family]()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sites = find_expert_sites(model)
    batch = collate([Example((3, 4, 5, 6, 7, 8), 2), Example((9, 8, 7), 1)], 0)
    chosen, again = SELECTIONS[kind]()(model, sites, [[batch]] * 2, [5, 5], count)
    assert chosen == again
    assert len(chosen) == len(sites)
    for own, site in zip(chosen, sites, strict=True):
        assert len(set(own)) == len(own) == count
        assert all(0 <= expert < site.num_experts for expert in own)
    (first,) = SELECTIONS[kind]()(model, sites, [[batch]], [5], 1)
    assert [own[:1] for own in chosen] == first, "the best one stays the best of several"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("kind", STRATEGIES)
def test_a_strategy_knows_no_order_keeps_its_inputs_and_streams(kind):
    strategy = STRATEGIES[kind]()
    sent = updates(strategy)
    state = strategy.init({n: torch.zeros(shape) for n, shape in SHAPES.items()})
    kept = copy.deepcopy((state, sent))
    forth = strategy.aggregate(state, iter(sent))
    back = strategy.aggregate(state, reversed(sent))
    for ours, theirs in ((forth.shared, back.shared), (forth.memory, back.memory)):
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-7)
    for now, then in zip(sent, kept[1], strict=True):
        assert all(torch.equal(now.shared[n], then.shared[n]) for n in now.shared)
    assert all(torch.equal(state.shared[n], kept[0].shared[n]) for n in state.shared)
    nothing = strategy.aggregate(state, iter(()))
    assert all(torch.equal(nothing.shared[n], state.shared[n]) for n in state.shared)


def test_a_penalty_is_one_number_per_client_and_silent_at_the_anchor():
    made = [member() for member in STRATEGIES.values()]
    penalties = [strategy for strategy in made if isinstance(strategy, Penalises)]
    assert penalties, "no strategy has a penalty"
    for strategy in penalties:
        anchor = {"p": torch.randn(3, 2, 2), "q": torch.randn(3, 4)}
        assert torch.equal(strategy.penalty(anchor, anchor), torch.zeros(3))


@pytest.mark.parametrize("kind", PARTITIONS)
@pytest.mark.parametrize("seed", range(3))
def test_a_partition_deals_every_row_once_and_the_same_way_again(kind, seed):
    partition, train, test = PARTITIONS[kind](), rows(60), rows(40)
    dealt = partition(train, test, seed)
    for held, own in zip((train, test), dealt, strict=True):
        assert sorted(map(id, held)) == sorted(id(r) for each in own.values() for r in each)
    assert dealt == partition(train, test, seed)
    assert list(dealt[0]) == list(dealt[1]) == list(partition(train, test, seed + 1)[0])
    own, nothing = partition(train, (), seed)
    assert all(own.values()), "where the test set is central only train rows are dealt"
    assert not any(nothing.values())


@pytest.mark.parametrize("kind", PARTITIONS)
def test_a_partition_caps_the_rows_that_a_client_trains_on(kind):
    train, test = rows(60), rows(40)
    whole, capped = PARTITIONS[kind](), PARTITIONS[kind](rows=3)
    own, held_out = capped(train, test, 0)
    assert max(map(len, own.values())) == 3
    assert held_out == whole(train, test, 0)[1], "tests stay as they were"
    if kind != "dirichlet-even":  # there it is the size of all
        for name, kept in own.items():
            assert set(map(id, kept)) <= set(map(id, whole(train, test, 0)[0][name]))
    with pytest.raises(PomonaError, match="-1 rows per client are negative"):
        PARTITIONS[kind](rows=-1)


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_template_asks_the_same_in_training_and_evaluation(kind, dense_dir):
    tokenizer = AutoTokenizer.from_pretrained(dense_dir)
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant: {% endif %}"
    )
    template, row = TEMPLATES[kind](), Row("red apple", "green pear", "blue plum", "c")
    example = encode(row, template, tokenizer, 1000)
    asked = encode_prompt(row, template, tokenizer, 1000)
    assert list(example.input_ids[: example.prompt_length]) == asked
    text = tokenizer.decode(asked)
    assert "red apple" in text
    assert "green pear" in text
    assert "blue plum" not in text


RECORDS = {
    "dolly": {"instruction": "i", "context": "x", "response": "r", "category": "c"},
    "alpaca": {"instruction": "i", "input": "x", "output": "r"},
    "messages": {
        "messages": [{"role": "user", "content": "i"}, {"role": "assistant", "content": "r"}]
    },
    "sharegpt": {"conversations": [{"from": "human", "value": "i"}, {"from": "gpt", "value": "r"}]},
    "gsm8k": {"question": "i", "answer": "r\n#### 4"},
    "qa": {"question": "i", "answer": "r"},
    "prompt": {"prompt": "i", "completion": "r"},
    "mapped": {"instruction": "i", "response": "r"},
}


@pytest.mark.parametrize("kind", sorted(FORMATS.keys() - {"auto"}))
def test_a_format_is_found_by_its_fields(kind):
    record, made = RECORDS[kind], FORMATS[kind]()
    assert made.fits(record)
    assert not made.fits({})
    for reader in (made, Auto()):
        row = reader(record, "f:1")
        assert (row.instruction, row.response.partition("\n")[0]) == ("i", "r")
    if kind != "mapped":
        assert detect(record, "f:1") == made
    with pytest.raises(PomonaError, match=r"^f:1: "):
        made({}, "f:1")
