"""Where weights lie changes nothing that they compute, and offloaded ones are not in memory."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pomona.errors import PomonaError
from pomona.models.dense import dense_family
from pomona.models.loading import load_model
from pomona.models.placement import Placement, find_device, find_devices, placed
from pomona.models.weights import Checkpoint, read_tensors, write_tensors

OFFLOAD = Placement("cpu", offload=True)


@pytest.fixture
def copy(dense_dir, tmp_path):
    return shutil.copytree(dense_dir, tmp_path / "m")


def offloaded(folder: Path, dtype="float32"):
    checkpoint = Checkpoint.open(folder)
    return placed(checkpoint, dense_family(checkpoint), dtype, OFFLOAD)


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
def test_an_offloaded_model_computes_what_a_loaded_one_does(models_dir, dense_dir, tied, dtype):
    folder = models_dir / "stories260K" if tied else dense_dir
    loaded = load_model(folder, dtype).eval()
    ids_BT = torch.arange(24).view(2, 12)
    with offloaded(folder, dtype) as model, torch.no_grad():
        assert torch.equal(model(input_ids=ids_BT).logits, loaded(input_ids=ids_BT).logits)
        assert model.dtype == loaded.dtype
        assert not model.training
        places = {p.device.type for n, p in model.named_parameters() if ".layers." in n}
        assert places == {"meta"}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_offloaded_weights_are_not_in_memory_on_the_way_either(tmp_path):
    config = LlamaConfig(hidden_size=128, intermediate_size=8192, num_hidden_layers=12)
    config.update({"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 256})
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size > 150e6

    def resident(kind: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(kind))

    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    with offloaded(tmp_path, "bfloat16"):  # another dtype than the stored: transformers reads all
        assert resident("VmHWM") - before < size / 3


def without(folder: Path, name: str) -> None:
    tensors = read_tensors(folder / "model.safetensors")
    del tensors[name]
    write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})


def one_more(folder: Path) -> None:
    tensors = read_tensors(folder / "model.safetensors")
    more = {**tensors, "model.extra.weight": torch.ones(2)}
    write_tensors(folder / "model.safetensors", more, {"format": "pt"})


def narrower(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text()) | {"intermediate_size": 48}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda f: without(f, "model.layers.1.mlp.up_proj.weight"), "lacks the tensor"),
        (lambda f: without(f, "model.norm.weight"), "lacks the tensor"),
        (one_more, 'holds the tensor "model.extra.weight"'),
        (narrower, "is not what its config.json says"),
    ],
)
def test_what_a_checkpoint_lacks_is_told_as_when_it_is_loaded(copy, damage, complaint):
    damage(copy)
    told = []
    for opened in (lambda: load_model(copy), lambda: offloaded(copy).__enter__()):
        with pytest.raises(PomonaError, match=complaint) as caught:
            opened()
        told.append(str(caught.value).split(";")[-1])
    assert told[0] == told[1]


@pytest.mark.parametrize(
    ("placement", "held"),
    [
        (Placement(), 32),
        (Placement(layers=4), 4),
        (Placement(layers=99), 32),
        (Placement(offload=True), 4),
        (Placement(offload=True, layers=0), 32),
        (Placement(offload=True, layers=7), 7),
    ],
)
def test_an_offloaded_model_has_few_layers_at_once_unless_all_are_asked_for(placement, held):
    assert placement.at_once(32) == held
    assert placement.at_once(1) == 1


def test_a_name_stands_for_all_gpus_or_for_one(monkeypatch):
    assert find_devices("cpu") == (torch.device("cpu"),)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert find_devices("auto") == tuple(torch.device("cuda", index) for index in range(3))


def test_a_device_is_found_or_told():
    assert find_device("cpu") == torch.device("cpu")
    assert find_device("auto").type in ("cpu", "cuda")
    with pytest.raises(PomonaError, match='device "abacus" is not there; use auto, cpu or cuda'):
        find_device("abacus")
