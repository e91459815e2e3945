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
    for wrong in (tmp_path / "none", "./none", "a/b/c", "~/none"):
        with pytest.raises(PomonaError, match=r"(none|a/b/c) is not a folder; give a checkpoint"):
            checkpoint_folder(wrong)


@pytest.mark.parametrize("open_", [load_model, load_tokenizer, checkpoint_folder])
@pytest.mark.parametrize("name", ["mixtrue", "runs/mixtrue"])
def test_a_mistyped_folder_is_not_only_a_hub_id(monkeypatch, open_, name):
    """What is neither is told as both, after one try and without the library's retries."""
    import huggingface_hub

    def absent(*_, **__):
        raise OSError("404 Client Error.\nRepository Not Found")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", absent)
    with pytest.raises(PomonaError) as caught:
        open_(name)
    assert str(caught.value) == (
        f"{name} is not a folder, and as a Hub id it cannot be fetched (404 Client Error); check the "
        "path or the id"
    )


@pytest.mark.parametrize("open_", [load_model, load_tokenizer])
def test_a_hub_id_is_fetched_once_and_opened_like_a_folder(monkeypatch, dense_dir, open_):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **_: asked.append(name) or dense_dir
    )
    assert open_("org/name") is not None
    assert asked == ["org/name"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"hidden_act": "zzz"},
            'its config.json says hidden_act = "zzz", which is unknown; repair',
        ),
        (
            {"rope_parameters": {"rope_type": "zzz", "rope_theta": 1.0}},
            'its config.json says rope_type = "zzz", which is unknown; repair config.json',
        ),
        ({"num_attention_heads": 0}, "modulo by zero; check its config.json"),
        ({"model_type": "zzz"}, "model type `zzz`.*; check its config.json"),
    ],
)
def test_a_config_that_no_model_is_made_from_is_told(copy, changes, says):
    change_config(copy, **changes)
    with pytest.raises(PomonaError, match=says) as caught:
        load_model(copy)
    assert str(copy) in str(caught.value)


def test_a_checkpoint_with_more_layers_than_its_config_says_is_refused(copy):
    change_config(copy, num_hidden_layers=1)
    with pytest.raises(PomonaError) as caught:
        load_model(copy)
    assert f'{copy} holds the tensor "model.layers.1.input_layernorm.weight"' in str(caught.value)
    assert "(9 such tensors)" in str(caught.value)


def test_tensors_that_transformers_passes_over_on_purpose_are_no_mistake(copy, models_dir):
    tensors = read_tensors(copy / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    write_tensors(copy / "model.safetensors", tensors, {"format": "pt"})
    load_model(copy)
    tied = shutil.copytree(models_dir / "stories260K", copy / "tied")
    tensors = read_tensors(tied / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    write_tensors(tied / "model.safetensors", tensors, {"format": "pt"})
    load_model(tied)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff", b"[]", b"3", b'{"a": ' * 5000, b'{"a": "\\ud800"}', b"{}"]
)
def test_a_damaged_tokenizer_is_told(copy, name, content):
    (copy / name).write_bytes(content)
    with pytest.raises(PomonaError) as caught:
        load_tokenizer(copy)
    assert str(copy) in str(caught.value)


def test_without_a_tokenizer_the_sentence_has_an_end(copy):
    for path in copy.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(PomonaError) as caught:
        load_tokenizer(copy)
    assert str(caught.value).endswith(
        "tokenizer.json (or the family's own files) and tokenizer_config.json"
    )
    assert ":;" not in str(caught.value)


def test_a_config_with_a_wrong_type_is_told(dense_dir, tmp_path):
    shutil.copytree(dense_dir, tmp_path / "m")
    path = tmp_path / "m/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_size": "x"}))
    with pytest.raises(PomonaError, match=r"config.json is wrong: .*'hidden_size'.*; repair it"):
        load_model(tmp_path / "m")
