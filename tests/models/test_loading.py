"""Opening a model: what it holds is loaded, what it lacks is told and never made up."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from pomona.errors import PomonaError
from pomona.models.loading import (
    checkpoint_folder,
    context_length,
    load_model,
    load_tokenizer,
)
from pomona.models.weights import read_tensors, write_tensors


@pytest.fixture
def copy(dense_dir, tmp_path):
    return shutil.copytree(dense_dir, tmp_path / "m")


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("auto", torch.float32), ("float32", torch.float32), ("bfloat16", torch.bfloat16)],
)
@pytest.mark.parametrize("folder", ["dense_dir", "moe_dir"])
def test_a_whole_checkpoint_loads_as_transformers_loads_it(request, folder, dtype, expected):
    source = request.getfixturevalue(folder)
    ours = load_model(source, dtype).state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(source).state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == expected
        assert torch.equal(tensor, theirs[name].to(expected))


def test_tied_embeddings_are_not_missing_tensors(models_dir):
    model = load_model(models_dir / "stories260K")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert context_length(model) == model.config.max_position_embeddings


@pytest.mark.parametrize(
    "name", ["model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"]
)
def test_a_missing_tensor_is_named_instead_of_drawn_at_random(copy, name):
    tensors = read_tensors(copy / "model.safetensors")
    del tensors[name]
    write_tensors(copy / "model.safetensors", tensors, {"format": "pt"})
    with pytest.raises(PomonaError, match=f'lacks the tensor "{name}" \\(1 missing in all'):
        load_model(copy)


def test_tensors_that_contradict_the_config_are_named(copy):
    change_config(copy, intermediate_size=48)
    with pytest.raises(PomonaError, match=r"down_proj.* is not what its config.json says"):
        load_model(copy)


def test_a_context_is_the_config_s(copy):
    change_config(copy, max_position_embeddings=77)
    assert context_length(load_model(copy)) == 77


def test_a_tokenizer_without_an_end_is_refused(copy):
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (copy / name).is_file():
            settings = json.loads((copy / name).read_text())
            settings.pop("eos_token", None)
            (copy / name).write_text(json.dumps(settings))
    with pytest.raises(PomonaError, match="has no end-of-sequence token"):
        load_tokenizer(copy)


def test_a_folder_is_itself_and_a_path_that_is_none_is_told(copy, tmp_path):
    assert checkpoint_folder(str(copy)) == copy
    for wrong in (tmp_path / "none", "./none", "a/b/c", "none"):
        with pytest.raises(PomonaError, match=r"(none|a/b/c) is not a folder"):
            checkpoint_folder(wrong)


def test_a_config_with_a_wrong_type_is_told(dense_dir, tmp_path):
    shutil.copytree(dense_dir, tmp_path / "m")
    path = tmp_path / "m/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_size": "x"}))
    with pytest.raises(PomonaError, match=r"config.json is wrong: .*'hidden_size'.*; repair it"):
        load_model(tmp_path / "m")
