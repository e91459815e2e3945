"""Retraining: its parts against plain computations, and the whole against itself interrupted."""

import itertools
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import now_and_then, save_model
from families import FAMILIES
from laws.test_reconstruction_laws import DOMAINS, SMALL, logits_of
from safetensors.torch import load_file, save_file
from torch.nn import functional as fn
from transformers import AutoModelForCausalLM

from pomona.errors import PomonaError
from pomona.models.experts import find_expert_sites, freeze
from pomona.models.routing import routed_by
from pomona.pipelines.reconstruct import reconstruct
from pomona.reconstruction.planners import TopChannels
from pomona.reconstruction.retraining import ExpertStage, Objective, Retraining, RouterStage
from pomona.reconstruction.retraining.objective import language_loss
from pomona.reconstruction.retraining.routing import (
    balance_loss,
    soft,
    straight_through,
    z_loss,
)
from pomona.reconstruction.retraining.trainable import merge, train_experts, trained
from pomona.training.loop import AdamW, Moments, fit
from pomona.training.schedule import warm_cosine

TOKENS = torch.randint(3, 60, (4, 12), generator=torch.Generator().manual_seed(7))
SHORT = Retraining(
    router=RouterStage(tokens=6 * 64, learning_rate=0.02, temperature=0.5),
    experts=ExpertStage(tokens=7 * 64, learning_rate=0.01, rank=2),
    length=16,
    batch=2,
    accumulate=2,
    save_every=2,
)


def mixture(family="mixtral"):
    model = FAMILIES[family]()
    freeze(model)
    return model, find_expert_sites(model)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "granitemoeshared"])
@pytest.mark.parametrize("experts", ["lora", "full"])
def test_what_learns_is_silent_at_birth_and_merges_into_the_weights(family, experts):
    model, sites = mixture(family)
    names = list(model.state_dict())
    before = model(TOKENS).logits.detach()
    stage = ExpertStage(experts=experts, rank=2)
    train_experts(model, sites, stage, torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(TOKENS).logits, before, rtol=1e-5, atol=1e-6)
    parameters = trained(model)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    moved = model(TOKENS).logits
    moved.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in parameters.values())
    merge(model)
    assert list(model.state_dict()) == names
    assert not trained(model)
    torch.testing.assert_close(model(TOKENS).logits, moved.detach(), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(moved.detach(), before)


def test_soft_routing_sends_every_token_to_every_expert():
    _, sites = mixture()
    x = torch.randn(5, 32)
    with routed_by(sites, soft(0.5)) as routed, torch.no_grad():
        logits, weights, index = sites[0].router(x)
    torch.testing.assert_close(weights, (logits / 0.5).softmax(-1))
    assert index.tolist() == [[0, 1, 2, 3]] * 5
    assert len(routed) == 1
    with torch.no_grad():
        assert sites[0].router(x)[2].shape == (5, 2)


def test_straight_through_gives_a_single_experts_router_its_gradient_and_keeps_the_value():
    logits = torch.randn(6, 4, requires_grad=True)
    index = logits.argmax(-1, keepdim=True)
    weights, _ = straight_through(logits, torch.ones(6, 1), index)
    assert torch.equal(weights, torch.ones(6, 1))
    slope = torch.randn(6)
    (weights[:, 0] * slope).sum().backward()
    expected = torch.autograd.functional.jacobian(
        lambda z: (z.softmax(-1).gather(-1, index)[:, 0].log() * slope).sum(), logits.detach()
    )
    torch.testing.assert_close(logits.grad, expected)
    two = torch.rand(6, 2)
    assert straight_through(logits, two, torch.zeros(6, 2, dtype=torch.long))[0] is two


def test_router_losses_are_the_published_formulas():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 4, generator=generator)
    index = logits.topk(2).indices
    p = np.exp(logits.double().numpy())
    p /= p.sum(1, keepdims=True)
    f = np.bincount(index.flatten().numpy(), minlength=4) / 100
    assert float(balance_loss([(logits, index)])) == pytest.approx(
        4 * (f * p.mean(0)).sum(), rel=1e-5
    )
    z = np.log(np.exp(logits.double().numpy()).sum(1))
    assert float(z_loss([(logits, index)])) == pytest.approx((z**2).mean(), rel=1e-5)
    even = torch.arange(4).repeat(5).unsqueeze(1)
    assert float(balance_loss([(torch.zeros(20, 4), even)])) == pytest.approx(1)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_distillation_is_the_divergence_from_the_dense_model(temperature):
    student, _ = mixture()
    teacher, _ = mixture("qwen3_moe")
    objective = Objective(temperature=temperature)
    with torch.no_grad():
        found = float(language_loss(student, teacher, TOKENS, objective))
        p, q = (
            (m(TOKENS).logits[:, :-1].double() / temperature).softmax(-1).numpy()
            for m in (teacher, student)
        )
        assert found == pytest.approx((p * np.log(p / q)).sum(-1).mean() * temperature**2, rel=1e-4)
        assert float(language_loss(student, student, TOKENS, objective)) == pytest.approx(
            0, abs=1e-6
        )
        plain = float(language_loss(student, None, TOKENS, objective))
        logits = student(TOKENS).logits[:, :-1]
    assert plain == pytest.approx(
        float(fn.cross_entropy(logits.flatten(0, 1), TOKENS[:, 1:].flatten())), rel=1e-5
    )


def quadratic(steps, accumulate=1, resume=None, start=None, after=None):
    targets = torch.randn(40, 3, generator=torch.Generator().manual_seed(1))
    x = torch.zeros(1, 3) if start is None else start.clone()
    x.requires_grad_()
    losses = fit(
        [x],
        lambda i: (x - targets[i % 40]).square().mean(1),
        steps,
        lambda step: 0.1 / (step + 1),
        AdamW(),
        accumulate,
        resume,
        after,
    )
    return x.detach(), losses


def test_going_on_from_moments_equals_never_having_stopped():
    whole, losses = quadratic(9)
    kept = {}

    def after(moments, _loss):
        if moments.step == 4:
            copies = [[m.clone() for m in part] for part in (moments.first, moments.second)]
            kept["moments"] = Moments(4, *copies)

    half, _ = quadratic(4, after=after)
    again, rest = quadratic(9, resume=kept["moments"], start=half)
    assert torch.equal(again, whole)
    assert torch.equal(rest, losses[4:])


def test_accumulated_batches_are_one_step_of_their_mean():
    def plain():
        targets = torch.randn(40, 3, generator=torch.Generator().manual_seed(1))
        x = torch.zeros(1, 3, requires_grad=True)
        fit(
            [x],
            lambda i: (x - targets[2 * i : 2 * i + 2]).square().mean().view(1),
            3,
            lambda step: 0.1 / (step + 1),
            AdamW(),
        )
        return x.detach()

    torch.testing.assert_close(quadratic(3, accumulate=2)[0], plain())


def test_warm_cosine_rises_then_falls():
    rates = [warm_cosine(1.0, 0.1, step, 100, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert warm_cosine(1.0, 0.1, 0, 10, 0.0) == 1.0


CASES = {
    "two active": {"keep": 0.25},
    "one active": {"active": 1},
    "shared": {"active": 1, "keep": 0.25, "planner": TopChannels(shared=0.25)},
    "pruned": {"experts": 1, "active": 1},
}


@pytest.mark.parametrize("case", now_and_then(["two active", "shared"], ["one active", "pruned"]))
def test_retraining_brings_the_mixture_nearer_to_the_dense_model(dense_dir, tmp_path, case):
    how = replace(SHORT, router=replace(SHORT.router, tokens=40 * 64))
    how = replace(how, experts=replace(how.experts, tokens=60 * 64))
    made = replace(SMALL, **CASES[case])
    reconstruct(dense_dir, DOMAINS, tmp_path / "before", made)
    result = reconstruct(dense_dir, DOMAINS, tmp_path / "after", replace(made, retrain=how))
    assert not (tmp_path / ".after.work").exists()
    kind = AutoModelForCausalLM.from_pretrained(tmp_path / "after").config.model_type
    assert kind == {"shared": "granitemoeshared", "pruned": "llama"}.get(case, "mixtral")
    shapes = [
        {name: t.shape for name, t in load_file(tmp_path / n / "model.safetensors").items()}
        for n in ("before", "after")
    ]
    assert shapes[0] == shapes[1]
    losses = json.loads((tmp_path / "after/reconstruction/retraining.json").read_text())["losses"]
    assert len(losses) == (60 if case == "pruned" else 100)
    assert result.out == tmp_path / "after"
    assert "Retrained on" in (tmp_path / "after/README.md").read_text()

    dense = logits_of(dense_dir).log_softmax(-1)
    away = {
        n: float(fn.kl_div(logits_of(tmp_path / n).log_softmax(-1), dense, log_target=True))
        for n in ("before", "after")
    }
    assert away["after"] < away["before"]


class Stopped(BaseException):
    """Stands for the process ending right there."""


@pytest.mark.parametrize("stop", now_and_then([3, 7, 12], [1, 6, 9]))
def test_interrupted_retraining_goes_on_to_the_same_bytes(dense_dir, tmp_path, monkeypatch, stop):
    settings = replace(SMALL, retrain=SHORT)
    reconstruct(dense_dir, DOMAINS, tmp_path / "whole", settings)
    seen = []

    def progress(stage, done, _total, *_figures):
        if stage.startswith("retraining"):
            seen.append(done)
            if len(seen) == stop:
                raise Stopped

    with pytest.raises(Stopped):
        reconstruct(dense_dir, DOMAINS, tmp_path / "cut", settings, progress)
    assert not (tmp_path / "cut").exists()
    with pytest.raises(PomonaError, match="unfinished reconstruction of other settings"):
        reconstruct(dense_dir, DOMAINS, tmp_path / "cut", replace(settings, seed=1))
    again = []
    reconstruct(
        dense_dir, DOMAINS, tmp_path / "cut", settings, lambda stage, *_: again.append(stage)
    )
    assert "calibrating" not in again
    for name in ("model.safetensors", "config.json", "reconstruction/retraining.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def _halted(dense, domains, out, settings):
    """Leave an interrupted reconstruction at `out`."""

    def progress(stage, *_):
        if stage.startswith("retraining"):
            raise Stopped

    with pytest.raises(Stopped):
        reconstruct(dense, domains, out, settings, progress)


def test_it_goes_on_from_the_same_domains_only(dense_dir, tmp_path):
    settings = replace(SMALL, retrain=SHORT)
    _halted(dense_dir, DOMAINS, tmp_path / "out", settings)
    name = next(iter(DOMAINS))
    other = {**DOMAINS, name: [*DOMAINS[name], "one sentence more"]}
    with pytest.raises(PomonaError, match="unfinished reconstruction of other domains"):
        reconstruct(dense_dir, other, tmp_path / "out", settings)
    with pytest.raises(PomonaError, match="unfinished reconstruction of other text"):
        reconstruct(dense_dir, DOMAINS, tmp_path / "out", settings, text=["something else"] * 200)


def test_it_goes_on_from_the_same_weights_only(dense_dir, tmp_path):
    settings = replace(SMALL, retrain=SHORT)
    dense = tmp_path / "dense"
    shutil.copytree(dense_dir, dense)
    _halted(dense, DOMAINS, tmp_path / "out", settings)
    weights = load_file(dense / "model.safetensors")
    save_file(
        {name: tensor * 1.01 for name, tensor in weights.items()}, dense / "model.safetensors"
    )
    with pytest.raises(PomonaError, match="unfinished reconstruction of other weights"):
        reconstruct(dense, DOMAINS, tmp_path / "out", settings)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_bfloat16_and_checkpointing_work(dense_dir, tmp_path, checkpointing):
    how = replace(SHORT, dtype="bfloat16", checkpointing=checkpointing)
    reconstruct(dense_dir, DOMAINS, tmp_path / "out", replace(SMALL, retrain=how))
    weights = load_file(tmp_path / "out/model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert logits_of(tmp_path / "out").isfinite().all()


def test_checkpointing_changes_no_gradient(dense_dir, tmp_path):
    for name, checkpointing in (("plain", False), ("again", True)):
        how = replace(SHORT, checkpointing=checkpointing)
        reconstruct(dense_dir, DOMAINS, tmp_path / name, replace(SMALL, retrain=how))
    plain, again = (load_file(tmp_path / n / "model.safetensors") for n in ("plain", "again"))
    for name, tensor in plain.items():
        torch.testing.assert_close(tensor, again[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            replace(SHORT, length=999, router=RouterStage(), experts=ExpertStage(tokens=4 * 999)),
            "windows of 999 tokens are longer than the context",
        ),
        (
            replace(
                SHORT,
                router=RouterStage(),
                experts=ExpertStage(tokens=64, experts="none", router="none", norms=False),
            ),
            "nothing would be retrained",
        ),
    ],
)
def test_retraining_that_cannot_be_is_told(dense_dir, tmp_path, how, message):
    with pytest.raises(PomonaError, match=message):
        reconstruct(dense_dir, DOMAINS, tmp_path / "out", replace(SMALL, retrain=how))
    assert not (tmp_path / "out").exists()


def test_too_little_text_is_told(dense_dir, tmp_path):
    settings = replace(SMALL, retrain=replace(SHORT, length=200, batch=1, accumulate=1))
    with pytest.raises(PomonaError, match="fewer than 200 tokens"):
        reconstruct(dense_dir, DOMAINS, tmp_path / "out", settings, text=["red apple"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RouterStage(tokens=-1), "tokens -1 is negative"),
        (lambda: RouterStage(temperature=0), "temperature 0 is not positive"),
        (lambda: RouterStage(warm_up=1.0), "warm_up 1.0 and floor 0.1 are to be shares"),
        (lambda: RouterStage(floor=-0.1), "warm_up 0.0 and floor -0.1 are to be shares"),
        (lambda: ExpertStage(learning_rate=0), "learning_rate 0 is not positive"),
        (lambda: ExpertStage(experts="some"), 'experts "some" is unknown; use one of lora, full'),
        (lambda: ExpertStage(rank=0), "rank 0 is not positive"),
        (lambda: ExpertStage(warm_up=1.0), "warm_up 1.0 and floor 0.1 are to be shares"),
        (lambda: ExpertStage(alpha=0.0), "alpha 0.0 is not positive; use for example 16"),
        (lambda: ExpertStage(alpha=float("nan")), "alpha nan is not positive"),
        (lambda: Objective(loss="l2"), 'loss "l2" is unknown; use one of distil, cross-entropy'),
        (lambda: Objective(balance=-1), "balance and z not negative"),
        (lambda: Retraining(batch=0), "batch 0 is not positive"),
        (lambda: Retraining(length=1), "length 1 is too small"),
        (
            lambda: Retraining(experts=ExpertStage(tokens=2047)),
            r"experts\.tokens 2047 is less than one step, 2048 tokens \(1 · 8 windows of 256\)",
        ),
        (
            lambda: replace(SHORT, router=RouterStage(tokens=1)),
            r"router\.tokens 1 is less than one step, 64 tokens \(2 · 2 windows of 16\)",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, message):
    with pytest.raises(PomonaError, match=message):
        make()


def test_whole_steps_are_what_is_seen_and_none_is_no_stage():
    how = replace(SHORT, router=RouterStage(), experts=ExpertStage(tokens=3 * 64 + 63))
    assert (how.steps(how.experts.tokens), how.seen()) == (3, (0, 3 * 64))
    assert SHORT.seen() == (6 * 64, 7 * 64)


@pytest.mark.parametrize("stage", ["router", "experts"])
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_both_stages_follow_their_schedule(monkeypatch, stage, schedule):
    """The rates AdamW is given, against the formula: a line up, then half a cosine down to the floor."""
    import math

    from pomona.reconstruction.retraining import retrain, stages

    given = []

    def noting(parameters, losses, steps, rate, *rest):
        given.extend(rate(step) for step in range(steps))
        return fit(parameters, losses, steps, rate, *rest)

    monkeypatch.setattr(stages, "fit", noting)
    model, sites = mixture()
    rates = {"learning_rate": 0.01, "schedule": schedule, "warm_up": 0.2, "floor": 0.25}
    how = replace(
        SHORT,
        router=RouterStage(tokens=10 * 64 if stage == "router" else 0, **rates),
        experts=ExpertStage(tokens=10 * 64 if stage == "experts" else 0, rank=2, **rates),
        objective=Objective(loss="cross-entropy"),
    )
    retrain(model, sites, None, TOKENS, how, 0, None, lambda *_: None, lambda *_: None)
    low = 0.01 if schedule == "constant" else 0.0025
    fall = [low + (0.01 - low) * (1 + math.cos(math.pi * step / 7)) / 2 for step in range(8)]
    assert given == pytest.approx([0.005, 0.01, *fall])


def test_a_constant_router_stage_is_what_it_was(dense_dir, tmp_path):
    """Neither warm-up nor floor is at work by default."""
    made = {}
    for floor in (0.1, 1.0):
        how = replace(SHORT, router=replace(SHORT.router, floor=floor))
        reconstruct(dense_dir, DOMAINS, tmp_path / str(floor), replace(SMALL, retrain=how))
        made[floor] = (tmp_path / str(floor) / "model.safetensors").read_bytes()
    assert made[0.1] == made[1.0]
    how = replace(SHORT, router=replace(SHORT.router, schedule="cosine"))
    reconstruct(dense_dir, DOMAINS, tmp_path / "cosine", replace(SMALL, retrain=how))
    assert (tmp_path / "cosine/model.safetensors").read_bytes() != made[0.1]


AS_SAVED = {
    "mixtral": ("Llama", {}),
    "granite": ("Llama", {"active": 1, "keep": 0.25, "planner": TopChannels(shared=0.25)}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "pruned": ("Llama", {"experts": 1, "active": 1}),
}


@pytest.mark.parametrize("case", AS_SAVED)
@pytest.mark.parametrize("experts", now_and_then(["lora"], ["full"]))
def test_the_checkpoint_is_the_student_that_was_trained(tmp_path, monkeypatch, case, experts):
    """Merged in memory and opened by plain transformers: the same logits."""
    import pomona.pipelines.reconstruct as pipeline

    tokens = torch.randint(3, 300, (3, 40), generator=torch.Generator().manual_seed(0))
    in_memory = {}
    write = pipeline.write_retrained

    def noting(out, student, *rest):
        with torch.no_grad():
            in_memory["logits"] = student(tokens).logits
        write(out, student, *rest)

    monkeypatch.setattr(pipeline, "write_retrained", noting)
    kind, change = AS_SAVED[case]
    dense = save_model(tmp_path / "dense", kind, intermediate_size=64)
    how = replace(SHORT, experts=replace(SHORT.experts, experts=experts))
    reconstruct(dense, DOMAINS, tmp_path / "out", replace(SMALL, retrain=how, **change))
    saved = logits_of(tmp_path / "out")
    torch.testing.assert_close(saved, in_memory["logits"], rtol=0, atol=1e-5)
    reconstruct(dense, DOMAINS, tmp_path / "before", replace(SMALL, **change))
    assert (logits_of(tmp_path / "before") - saved).abs().max() > 1e-3  # it did train


@pytest.mark.parametrize("key", ["dtype", "torch_dtype", None])
@pytest.mark.parametrize("experts", [1, 2])
def test_the_result_has_the_type_of_the_checkpoint(tmp_path, dense_dir, key, experts):
    """Older configs say torch_dtype, some say nothing."""
    dense = tmp_path / "dense"
    shutil.copytree(dense_dir, dense)
    weights = load_file(dense / "model.safetensors")
    halves = {name: tensor.bfloat16() for name, tensor in weights.items()}
    save_file(halves, dense / "model.safetensors", {"format": "pt"})
    config = json.loads((dense / "config.json").read_text())
    del config["dtype"]
    config |= {key: "bfloat16"} if key else {}
    (dense / "config.json").write_text(json.dumps(config))
    made = replace(SMALL, experts=experts, active=1, retrain=SHORT)
    reconstruct(dense, DOMAINS, tmp_path / "out", made)
    kept = load_file(tmp_path / "out/model.safetensors")
    assert {tensor.dtype for tensor in kept.values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_every_dense_family_retrains(tmp_path):
    for kind in ("Mistral", "Qwen2", "Qwen3"):
        folder = save_model(tmp_path / kind, kind, intermediate_size=64)
        reconstruct(folder, DOMAINS, tmp_path / f"{kind}-out", replace(SMALL, retrain=SHORT))
        assert logits_of(tmp_path / f"{kind}-out").isfinite().all()
