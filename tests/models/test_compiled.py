"""Compiled normalisations compute what they do otherwise, under LoRA and grafts, in several threads."""

import shutil

import pytest
import torch
from families import double
from torch import nn

from pomona.data.examples import Example
from pomona.errors import PomonaError
from pomona.federation.cohort import FrozenBase
from pomona.federation.graft import Graft
from pomona.federation.local import LocalTraining, train_cohort
from pomona.federation.replicas import replicas_of
from pomona.federation.stage import Task
from pomona.federation.strategies import FedAvg
from pomona.federation.update import ClientState
from pomona.models.compiled import compile_norms
from pomona.models.experts import find_expert_sites, freeze
from pomona.models.lora import LoRA


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles with g++ on a processor")
def test_clients_train_as_without():
    model = double("mixtral").float()
    freeze(model)
    sites = tuple(find_expert_sites(model))
    base = FrozenBase(model, LoRA(rank=2), Graft(rank=2, gate="zero"), sites)
    row = Example(tuple(range(3, 12)), 3)
    state = ClientState(base.init_adapter(0), base.init_graft(0, "a", [[0]] * len(sites)))
    tasks = [Task(name, state, [row] * 4) for name in ("a", "b", "c")]
    rest = (LocalTraining(steps=3, batch=2), FedAvg(), 0, 1, 1, 0)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        plain, compiled = replicas_of(base), replicas_of(base)
        for replica in compiled.bases[1:]:
            compile_norms(replica.model)
        found, expected = (
            replicas.map(lambda own, part: train_cohort(own, part, *rest), tasks)
            for replicas in (compiled, plain)
        )
    finally:
        torch.set_num_threads(before)
    norms = [m for m in compiled.bases[1].model.modules() if m._compiled_call_impl is not None]
    assert len(norms) == 2 * len(sites) + 1
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.losses, other.losses, rtol=1e-4, atol=1e-5)
        for name, value in one.state.adapter.items():
            torch.testing.assert_close(value, other.state.adapter[name], rtol=1e-3, atol=1e-5)


def test_where_nothing_can_be_compiled_it_is_said(monkeypatch):
    def fails(*_):
        raise RuntimeError("a long story\nInvalidCxxCompiler: no g++")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: fails)
    with pytest.raises(PomonaError, match=r"compile = true, but .*no g\+\+.*leave compile out"):
        compile_norms(double("mixtral"))


def test_every_normalisation_is_found_and_nothing_else(monkeypatch):
    found = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, **_: found.append(module))
    monkeypatch.setattr(torch, "compile", lambda function: function)
    compile_norms(double("qwen3_moe"))
    kinds = {type(module).__name__ for module in found}
    assert (
        kinds == {"Qwen3MoeRMSNorm"} and len(found) == 3 * 4 + 1
    )  # before and after attention, q, k
