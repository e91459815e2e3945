"""Weights on disk: lazily read, written in shards, and a sentence for every broken file."""

import json
import os

import pytest
import torch
from transformers import AutoModelForCausalLM

from pomona.errors import PomonaError
from pomona.models.loading import load_model, load_tokenizer
from pomona.models.weights import Checkpoint, read_tensors, write_sharded, write_tensors


def test_a_checkpoint_is_read_tensor_by_tensor(dense_dir):
    checkpoint = Checkpoint.open(dense_dir)
    state = AutoModelForCausalLM.from_pretrained(dense_dir).state_dict()
    assert checkpoint.files
    for name in checkpoint.files:
        assert torch.equal(checkpoint.tensor(name), state[name])
    with pytest.raises(PomonaError, match='lacks the tensor "nothing"'):
        checkpoint.tensor("nothing")


@pytest.mark.parametrize("limit", [10**9, 30_000, 1])
def test_shards_hold_everything_and_transformers_reads_them(dense_dir, tmp_path, limit):
    source = Checkpoint.open(dense_dir)
    (tmp_path / "config.json").write_text(json.dumps(source.config))
    total = write_sharded(tmp_path, ((n, source.tensor(n)) for n in source.files), limit)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == {10**9: 1, 1: len(source.files)}.get(limit, len(files))
    assert (len(files) > 1) == (tmp_path / "model.safetensors.index.json").exists()
    again = Checkpoint.open(tmp_path)
    assert again.files.keys() == source.files.keys()
    assert total == sum(source.tensor(n).nbytes for n in source.files)
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(p).state_dict() for p in (tmp_path, dense_dir)
    )
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)


def test_equal_tensors_give_equal_bytes_whatever_their_order(tmp_path):
    tensors = {"b": torch.arange(3.0), "a": torch.ones(2, 2)[:, ::2]}
    write_tensors(tmp_path / "x", tensors, {"k": "v"})
    write_tensors(tmp_path / "y", dict(reversed(tensors.items())), {"k": "v"})
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()
    assert torch.equal(read_tensors(tmp_path / "x")["a"], torch.ones(2, 1))


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
def test_a_damaged_file_is_named(dense_dir, tmp_path, damage):
    import shutil

    shutil.copytree(dense_dir, tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(
        {"truncated": whole[: len(whole) // 2], "garbage": b"x" * 500, "empty": b""}[damage]
    )
    with pytest.raises(PomonaError, match=r"model.safetensors is damaged or cut off"):
        load_model(tmp_path / "m")
    with pytest.raises(PomonaError, match=r"model.safetensors is damaged or cut off"):
        read_tensors(path)


def test_missing_things_are_named(dense_dir, tmp_path):
    import shutil

    with pytest.raises(PomonaError, match="none is not a folder"):
        load_model(tmp_path / "none")
    with pytest.raises(PomonaError, match=r"holds no config.json"):
        load_model(tmp_path)
    shutil.copytree(dense_dir, tmp_path / "m")
    (tmp_path / "m/model.safetensors").rename(tmp_path / "m/pytorch_model.bin")
    with pytest.raises(PomonaError, match=r"holds no model.safetensors; convert"):
        load_model(tmp_path / "m")
    (tmp_path / "m/tokenizer.json").unlink()
    (tmp_path / "m/tokenizer_config.json").unlink()
    with pytest.raises(PomonaError, match=r"cannot load a tokenizer from"):
        load_tokenizer(tmp_path / "m")
    with pytest.raises(PomonaError, match="missing"):
        read_tensors(tmp_path / "nothing.safetensors")


def test_a_shard_that_the_index_names_but_is_gone(dense_dir, tmp_path):
    source = Checkpoint.open(dense_dir)
    (tmp_path / "config.json").write_text(json.dumps(source.config))
    write_sharded(tmp_path, ((n, source.tensor(n)) for n in source.files), 30_000)
    gone = sorted(tmp_path.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(
        PomonaError, match=f"{gone.name} is missing; the checkpoint's index names it"
    ):
        Checkpoint.open(tmp_path)


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    from pomona.models import weights

    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.ones(2)}, {})
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "save_file", full)
    with pytest.raises(PomonaError, match=r"cannot write .*x.safetensors: No space left on device"):
        write_tensors(path, {"a": torch.zeros(2)}, {})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("config.json", "{nope", "key must be a string"),
        ("config.json", "[1]", "it is not a JSON object"),
        ("config.json", b"\xff\xfe", "expected value"),
        ("config.json", '{"a": ' * 5000, "recursion limit"),
        ("config.json", '{"model_type": "\\ud800"}', "hex escape"),
        ("model.safetensors.index.json", "{nope", "key must be a string"),
        ("model.safetensors.index.json", "{}", "it has no weight_map"),
        ("model.safetensors.index.json", '{"weight_map": []}', "it has no weight_map"),
    ],
)
def test_damaged_json_is_named(dense_dir, tmp_path, name, content, reason):
    import shutil

    shutil.copytree(dense_dir, tmp_path / "m")
    (tmp_path / "m" / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(PomonaError, match=f"{name} is damaged or cut off .*{reason}"):
        Checkpoint.open(tmp_path / "m")


@pytest.mark.parametrize(("mask", "mode"), [(0o077, 0o600), (0o022, 0o644)])
def test_weights_have_the_mode_that_the_umask_says(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        write_tensors(tmp_path / "x.safetensors", {"a": torch.ones(2)}, {})
        write_sharded(tmp_path, ((n, torch.ones(99)) for n in "abc"), 500)
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert len(list(tmp_path.glob("model-*.safetensors"))) == 3
    assert modes == {mode}
