"""The router's load-balancing loss, per client, against what transformers computes on its rows alone."""

from dataclasses import replace

import pytest
import torch
from families import FAMILIES, llama
from laws.test_federation_laws import base_of, examples, grown, newborn
from test_federate import run
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from pomona.data.examples import collate
from pomona.errors import PomonaError
from pomona.federation.dp_sgd import DPSGD
from pomona.federation.graft import Graft
from pomona.federation.local import LocalTraining, train_cohort
from pomona.federation.objective import client_losses
from pomona.federation.settings import FederateSettings, Finish
from pomona.federation.stage import Stage, Task
from pomona.federation.strategies import FedAvg
from pomona.federation.update import ClientState, stack
from pomona.models.experts import find_expert_sites
from pomona.models.routing import routed_by
from pomona.models.split import Even
from pomona.recipe import dump, read_recipe
from pomona.training.loop import AdamW
from pomona.training.loss import balance_losses, balance_weight

BALANCED = [name for name, make in FAMILIES.items() if hasattr(make(), "router_aux_loss_coef")]
OTHERS = [name for name in FAMILIES if name not in BALANCED]


def test_who_defines_the_loss():
    assert {"mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss"} <= set(BALANCED)
    assert {"deepseek_v2", "deepseek_v3", "glm4_moe"} <= set(OTHERS)


@pytest.mark.parametrize("family", BALANCED)
def test_every_clients_loss_is_the_models_own_on_its_rows_alone(family):
    """Rows of many lengths, so that padding would show; the model's `aux_loss`, client by client."""
    model = FAMILIES[family]()
    sites = find_expert_sites(model)
    rows = [row for c in range(3) for row in examples(c, 2)]
    batch = collate(rows, 0)
    assert not batch.attention_mask_BT.all()
    with routed_by(sites) as routed, torch.no_grad():
        model(input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT, use_cache=False)
    counted_N = batch.attention_mask_BT.bool().flatten()
    found_C = balance_losses(routed, counted_N, even(len(counted_N), 3))
    for c in range(3):
        own = slice(2 * c, 2 * c + 2)
        with torch.no_grad():
            output = model(
                input_ids=batch.input_ids_BT[own],
                attention_mask=batch.attention_mask_BT[own],
                use_cache=False,
                output_router_logits=True,
            )
        torch.testing.assert_close(found_C[c], output.aux_loss, rtol=1e-5, atol=1e-6)
    assert found_C.std() > 0


def test_on_logits_it_is_the_function_of_transformers():
    """Clients of other numbers of counted tokens, one of none, and logits in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    for kind in (torch.float32, torch.bfloat16):
        logits = [(3 * torch.randn(24, 5, generator=generator)).to(kind) for _ in range(3)]
        mask_BT = torch.rand(6, 4, generator=generator) < 0.6
        mask_BT[4:] = False
        routed = [(layer, layer.topk(2).indices) for layer in logits]
        found_C = balance_losses(routed, mask_BT.flatten(), even(24, 3))
        assert found_C[2] == 0
        for c in range(2):
            own = tuple(layer[8 * c : 8 * c + 8] for layer in logits)
            expected = load_balancing_loss_func(own, 5, 2, mask_BT[2 * c : 2 * c + 2].long())
            torch.testing.assert_close(found_C[c], expected, rtol=1e-5, atol=1e-6)


def test_tokens_that_go_everywhere_alike_cost_the_number_of_active_experts():
    logits = 1e-4 * torch.eye(4).repeat(5, 1)
    routed = [(logits, logits.topk(1).indices)]
    found_C = balance_losses(routed, torch.ones(20, dtype=torch.bool), even(20, 1))
    assert float(found_C) == pytest.approx(1.0)
    crowded = [(torch.tensor([[50.0, 0, 0, 0]]).repeat(20, 1), routed[0][1])]
    found_C = balance_losses(crowded, torch.ones(20, dtype=torch.bool), even(20, 1))
    assert float(found_C) == pytest.approx(4.0)


def even(tokens: int, clients: int) -> Even:
    return Even(tokens, clients, torch.device("cpu"))


def leaves(state: ClientState) -> ClientState:
    def one(tensors):
        return {
            n: v.clone().requires_grad_() if v.is_floating_point() else v
            for n, v in tensors.items()
        }

    return ClientState(one(state.adapter), one(state.graft))


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_its_gradient_is_the_models_own_and_the_loss_that_is_told_the_answers(family):
    """Added rows of alignment do not count: the clients have three rows, one and two."""
    base = base_of(family)
    rows = [examples(0, 3), examples(1, 1), examples(2, 2)]
    states = [grown(newborn(base, f"c{c}", c % 2), c) for c in range(3)]
    stacked = leaves(stack(states))
    losses = []
    for factor in (0.0, 0.5):
        with base.attach(stacked):
            loss_C = client_losses(base, rows, 3, 0, factor)
        losses.append(loss_C.detach())
        loss_C.sum().backward()
        if factor == 0.0:
            plain = {n: v.grad.clone() for n, v in stacked.adapter.items()}
    assert torch.equal(*losses)
    for c, own in enumerate(rows):
        state = leaves(states[c])
        batch = collate(own, 0)
        with base.attach_one(state):
            output = base.model(
                input_ids=batch.input_ids_BT,
                attention_mask=batch.attention_mask_BT,
                use_cache=False,
                output_router_logits=True,
            )
        output.aux_loss.backward()
        moved = 0
        for name, value in stacked.adapter.items():
            added = value.grad[c] - 2 * plain[name][c]  # both passes have the answers' gradient
            expected = state.adapter[name].grad
            if expected is not None:  # what follows the last router has none
                torch.testing.assert_close(added, 0.5 * expected, rtol=1e-3, atol=1e-5)
                moved += bool(expected.abs().max() > 1e-4)
        assert moved >= 4


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_a_cohort_is_its_clients_one_by_one_and_the_loss_matters(family):
    base = base_of(family)
    training = LocalTraining(
        steps=3, batch=3, learning_rate=1e-3, router_loss=0.5, optimiser=AdamW(epsilon=1e-5)
    )
    tasks = [
        Task(f"c{c}", grown(newborn(base, f"c{c}", c % 2), c), examples(c, rows))
        for c, rows in enumerate((2, 5, 3))
    ]
    together = train_cohort(base, tasks, training, FedAvg(), 0, 1, 2, 0)
    plain = train_cohort(base, tasks, replace(training, router_loss=0.0), FedAvg(), 0, 1, 2, 0)
    for task, ours, without in zip(tasks, together, plain, strict=True):
        (alone,) = train_cohort(base, [task], training, FedAvg(), 0, 1, 2, 0)
        assert ours.losses == pytest.approx(alone.losses, rel=1e-5)
        assert ours.losses[0] == without.losses[0]
        for part in ("adapter", "graft"):
            for name, value in getattr(ours.state, part).items():
                torch.testing.assert_close(
                    value, getattr(alone.state, part)[name], rtol=1e-5, atol=2e-5
                )
        assert any(
            (v - without.state.adapter[n]).abs().max() > 1e-4 for n, v in ours.state.adapter.items()
        )


def test_with_dp_sgd_it_is_of_every_row_by_itself():
    """A row's gradient must not depend on the other rows: the mean over rows, not over their tokens."""
    base = base_of("mixtral")
    state = grown(newborn(base, "c"), 1)
    rows = examples(0, 3)
    stage = Stage(
        base, [Task("c", state, rows)], [[[0, 1, 2]]], FedAvg(), AdamW(), 0.0, 0, router_loss=0.5
    )
    _, together = stage.row_gradients(0, leaves(stack([state])))
    for i in range(3):
        _, alone = replace(stage, drawn=[[[i]]]).row_gradients(0, leaves(stack([state])))
        for name, gradient in together.items():
            torch.testing.assert_close(gradient[i], alone[name][0], rtol=1e-4, atol=1e-5)
    training = LocalTraining(steps=1, batch=3, router_loss=0.5, dp_sgd=DPSGD(1.0, 1.0))
    (trained,) = train_cohort(base, [Task("c", state, rows)], training, FedAvg(), 0, 1, 1, 0)
    assert all(v.isfinite().all() for v in trained.state.adapter.values())


def test_the_factor_is_what_is_asked_or_the_models():
    model = FAMILIES["olmoe"]()
    sites = find_expert_sites(model)
    assert balance_weight(model, sites, "model") == model.config.router_aux_loss_coef == 0.01
    assert balance_weight(model, sites, 0.25) == 0.25
    assert balance_weight(llama(), [], 0.0) == 0.0


@pytest.mark.parametrize("family", OTHERS)
@pytest.mark.parametrize("asked", [0.1, "model"])
def test_a_model_without_such_a_loss_is_refused(family, asked):
    model = FAMILIES[family]()
    with pytest.raises(PomonaError, match=f"{type(model).__name__} defines no load-balancing loss"):
        balance_weight(model, find_expert_sites(model), asked)


def test_a_dense_model_is_refused_before_anything_is_trained(settings, dense_dir, tmp_path):
    dense = replace(settings, model=str(dense_dir), graft=None)
    complaint = "LlamaForCausalLM defines no load-balancing loss .* leave local.router_loss out"
    wrong = LocalTraining(router_loss=0.1)
    finish = Finish(training=replace(wrong, router_loss="model"))
    for name, made in (("local", {"local": wrong}), ("finish", {"finish": finish})):
        with pytest.raises(PomonaError, match=complaint):
            run(replace(dense, **made), tmp_path / name)
        assert not (tmp_path / name / "metrics.jsonl").exists()


def test_a_federation_with_it_runs_and_tells_other_results(settings, tmp_path):
    short = replace(settings, rounds=1, graft=Graft(rank=2))
    results = [
        run(replace(short, local=replace(short.local, router_loss=loss)), tmp_path / str(loss))
        for loss in (0.0, "model", 0.001, 1.0)
    ]
    losses = [r["personal"]["mean"]["loss"] for r in results]
    assert losses[1] == losses[2], "a Mixtral's own factor"
    assert len({losses[0], losses[1], losses[3]}) == 3


def test_a_recipe_says_it(tmp_path):
    text = 'model = "org/name"\n[data]\ntrain = "t"\ntest = "t"\n[local]\n'
    recipe = tmp_path / "recipe.toml"
    for told, value in (('"model"', "model"), ("0.001", 0.001), ("1", 1.0)):
        recipe.write_text(f"{text}router_loss = {told}\n", encoding="utf-8")
        made = read_recipe(recipe, FederateSettings)
        assert made.local == LocalTraining(router_loss=value)
        recipe.write_text(dump(made), encoding="utf-8")
        assert read_recipe(recipe, FederateSettings) == made
    for told, complaint in (
        ("-0.1", "local router_loss -0.1 is not 0 or more"),
        ('"mine"', "router_loss is 'mine'"),
    ):
        recipe.write_text(f"{text}router_loss = {told}\n", encoding="utf-8")
        with pytest.raises(PomonaError, match=complaint):
            read_recipe(recipe, FederateSettings)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_a_bad_factor_is_refused(bad):
    with pytest.raises(PomonaError, match=f"local router_loss {bad} is not 0 or more"):
        LocalTraining(router_loss=bad)
