"""A run goes on only from the model and the rows it began with."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pomona.artifacts.inputs import Inputs, difference
from pomona.artifacts.run import RunDirectory
from pomona.errors import PomonaError
from pomona.federation.clients import ClientData
from pomona.federation.evaluation import Evaluation
from pomona.federation.local import LocalTraining
from pomona.federation.settings import FederateSettings
from pomona.models.fingerprint import checkpoint_digests
from pomona.models.lora import LoRA
from pomona.models.weights import read_tensors, write_tensors
from pomona.pipelines.federate import federate
from pomona.recipe import dump


class Stopped(BaseException):
    """Stands for the process ending right there."""


@pytest.fixture(scope="module")
def begun(moe_dir, rows_dir, tmp_path_factory):
    """A folder with a model, rows per client and a run of two rounds that ended after the first."""
    folder = tmp_path_factory.mktemp("begun")
    shutil.copytree(moe_dir, folder / "model")
    (folder / "data").mkdir()
    for split in ("train", "test"):
        lines = (rows_dir / f"{split}.jsonl").read_text().splitlines()
        for name in ("apples", "pears"):
            own = [line for line in lines if json.loads(line)["category"] == name]
            (folder / f"data/{name}.{split}.jsonl").write_text("\n".join(own) + "\n")
    settings = FederateSettings(
        model=str(folder / "model"),
        data=ClientData(folder=folder / "data"),
        rounds=2,
        max_length=96,
        adapter=LoRA(2, 4.0),
        local=LocalTraining(steps=1, batch=2),
        evaluation=Evaluation(every=2, rows=2, answers=1, new_tokens=2),
    )

    def stop(*_):
        raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunDirectory, "note_time", stop)
        with pytest.raises(Stopped):
            run(settings, folder / "run")
    assert (folder / "run/checkpoint/state.json").is_file()
    return folder, settings


def run(settings, path):
    with RunDirectory.open(path, dump(settings), {"method": "m", "seed": 0}) as directory:
        return federate(settings, directory)


def rewrite(**fields: object) -> Callable[[Path], None]:
    """Change fields of the last row or of a JSON file."""

    def change(path: Path) -> None:
        *others, last = path.read_text().splitlines() if path.suffix == ".jsonl" else ["", ""]
        whole = last or path.read_text()
        lines = [*others, json.dumps(json.loads(whole) | fields)] if last else [whole]
        text = "\n".join(lines) if last else json.dumps(json.loads(whole) | fields)
        path.write_text(text)

    return change


def nudge(path: Path) -> None:
    """Move one number of one router."""
    tensors = read_tensors(path)
    name = next(n for n in sorted(tensors) if "mlp.gate" in n or "block_sparse_moe.gate" in n)
    tensors[name] = tensors[name].clone()
    tensors[name][0, 0] += 0.01
    write_tensors(path, tensors, {"format": "pt"})


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        ("data/pears.train.jsonl", rewrite(response="x"), 'the train rows of client "pears" have'),
        ("data/apples.test.jsonl", rewrite(context="x"), 'the test rows of client "apples" have'),
        (
            "model/config.json",
            rewrite(rms_norm_eps=0.1),
            "the model's file config.json has changed",
        ),
        (
            "model/tokenizer_config.json",
            rewrite(chat_template="x"),
            "the model's file tokenizer_config.json has changed",
        ),
        ("model/model.safetensors", nudge, "the model's file model.safetensors has changed"),
        ("model/generation_config.json", Path.unlink, "the model's file generation_config.json is"),
    ],
)
def test_what_has_changed_since_a_run_began_is_named(begun, file, change, says):
    folder, settings = begun
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    change(folder / file)
    with pytest.raises(PomonaError) as caught:
        run(settings, folder / "run")
    (folder / file).write_bytes(before[folder / file])
    message = str(caught.value)
    assert message.startswith(says)
    assert f"since the run in {folder / 'run'} began; restore what it was, or choose" in message
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_a_client_that_is_new_or_gone_is_named(begun):
    folder, settings = begun
    for split in ("train", "test"):
        shutil.copy(folder / f"data/pears.{split}.jsonl", folder / f"data/plums.{split}.jsonl")
    with pytest.raises(PomonaError, match='client "plums" is new since the run'):
        run(settings, folder / "run")
    for split in ("train", "test"):
        (folder / f"data/plums.{split}.jsonl").unlink()
        (folder / f"data/pears.{split}.jsonl").rename(folder / f"kept.{split}")
    with pytest.raises(PomonaError, match='client "pears" is gone since the run'):
        run(settings, folder / "run")
    for split in ("train", "test"):
        (folder / f"kept.{split}").rename(folder / f"data/pears.{split}.jsonl")


def test_a_finished_run_is_held_to_its_inputs_too_and_layout_does_not_count(begun, tmp_path):
    folder, settings = begun
    shutil.copytree(folder / "run", tmp_path / "run")
    run(settings, tmp_path / "run")
    rows, notes = folder / "data/pears.train.jsonl", folder / "model/NOTES.txt"
    before = rows.read_text()
    rows.write_text(before.replace('": ', '":  ') + "\n\n")  # the same rows, written otherwise
    notes.write_text("mine")
    run(settings, tmp_path / "run")
    notes.unlink()
    rows.write_text(before.replace("red", "blue"))
    with pytest.raises(PomonaError, match='the train rows of client "pears" have changed'):
        run(settings, tmp_path / "run")
    rows.write_text(before)


def test_a_run_that_computed_nothing_takes_other_inputs(begun, tmp_path):
    folder, settings = begun
    with RunDirectory.open(tmp_path / "run", dump(settings), {"method": "m", "seed": 0}) as made:
        made.claim(Inputs({"config.json": "other"}, {}))
    run(settings, tmp_path / "run")
    found = json.loads((tmp_path / "run/inputs.json").read_text())
    assert found["clients"].keys() == {"apples", "pears"}
    assert found["model"] == checkpoint_digests(folder / "model")


def test_equal_inputs_do_not_differ():
    one = Inputs({"a": "1"}, {"c": {"train": "1", "test": "2"}})
    assert difference(one, one) is None


def test_every_byte_of_small_tensors_and_both_ends_of_large_ones_count(dense_dir, tmp_path):
    folder = shutil.copytree(dense_dir, tmp_path / "m")
    path = folder / "model.safetensors"
    tensors = {"large": torch.arange(1 << 20, dtype=torch.float32), "small": torch.ones(9)}
    write_tensors(path, tensors, {"format": "pt"})
    first, whole = checkpoint_digests(folder), path.read_bytes()
    assert first.keys() >= {"config.json", "model.safetensors", "tokenizer.json"}
    header = 8 + int.from_bytes(whole[:8], "little")
    small = header + (1 << 22)
    for place in (header, small - 1, *range(small, len(whole))):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert checkpoint_digests(folder)["model.safetensors"] != first["model.safetensors"], place
    write_tensors(path, {**tensors, "large": tensors["large"] * 1.001}, {"format": "pt"})
    assert checkpoint_digests(folder)["model.safetensors"] != first["model.safetensors"]
    write_tensors(path, tensors, {"format": "pt"})
    assert checkpoint_digests(folder) == first
