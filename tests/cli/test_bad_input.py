"""A user's mistake is one sentence on stderr and exit code 2, and leaves nothing half-written."""

import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import now_and_then, word_text
from refusals import Refusal, sentence

from pomona.cli.app import main
from pomona.data.formats import Mapped
from pomona.federation.clients import ClientData
from pomona.federation.evaluation import Evaluation
from pomona.federation.graft import Graft
from pomona.federation.local import LocalTraining
from pomona.federation.partition import ByCategory, Dirichlet
from pomona.federation.settings import FederateSettings
from pomona.models.lora import LoRA
from pomona.recipe import dump

FAST = """
[settings]
experts = 3
keep = 0.5
windows = 4
length = 32
affinity_windows = 2
"""


@pytest.fixture
def refused(monkeypatch, capsys) -> Refusal:
    return Refusal(monkeypatch, capsys)


@pytest.fixture(scope="module")
def domains(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("domains")
    for number, name in enumerate("abcd"):
        (folder / f"{name}.txt").write_text(word_text(number, 200), encoding="utf-8")
    return folder


@pytest.fixture
def reconstruct_recipe(tmp_path: Path, dense_dir: Path, domains: Path) -> Callable[..., Path]:
    """Write a recipe that works unless something in it is replaced."""

    def write(model: Path = dense_dir, texts: Path = domains, settings: str = FAST) -> Path:
        path = tmp_path / "reconstruct.toml"
        path.write_text(f'model = "{model}"\ndomains = "{texts}"\n{settings}', encoding="utf-8")
        return path

    return write


@pytest.fixture
def settings(moe_dir: Path, rows_dir: Path) -> FederateSettings:
    return FederateSettings(
        model=str(moe_dir),
        data=ClientData(train=rows_dir / "train.jsonl", test=rows_dir / "test.jsonl"),
        rounds=2,
        max_length=96,
        adapter=LoRA(2, 4.0),
        graft=Graft(rank=2),
        local=LocalTraining(steps=1, batch=2),
        evaluation=Evaluation(every=2, rows=2, answers=1, new_tokens=2),
    )


def federation(folder: Path, settings: FederateSettings, more: str = "") -> Path:
    path = folder / "federate.toml"
    path.write_text(more + dump(settings), encoding="utf-8")
    return path


def test_reconstruct_names_a_missing_model_domain_folder_and_recipe(
    refused, tmp_path, dense_dir, domains
):
    out = tmp_path / "out"
    none = tmp_path / "none"
    given = ("--domains", domains, "--out", out, "--experts", 3)
    assert str(none) in refused("reconstruct", none, *given)
    assert str(none) in refused("reconstruct", dense_dir, "--domains", none, "--out", out)
    assert str(none) in refused("reconstruct", "--recipe", none, "--out", out)
    assert "--domains" in refused("reconstruct", dense_dir, "--out", out)
    assert "MODEL" in refused("reconstruct", "--domains", domains, "--out", out)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("e.txt", "", "e.txt is empty"),
        ("e.jsonl", "\n\n", "e.jsonl is empty"),
        ("e.jsonl", '{"text": "red"}\n{"text": \n', "e.jsonl:2: not valid JSON"),
        ("e.jsonl", '{"text": "red"}\n{"body": "x"}\n', 'e.jsonl:2: the field "text"'),
        ("e.jsonl", '{"text": 3}\n', 'e.jsonl:1: the field "text" is 3'),
        ("e.jsonl", "[1]\n", "e.jsonl:1: not a JSON object"),
        ("e.txt", b"\xff\xfe\x00", "e.txt is not UTF-8"),
        ("e.txt", "red plum", 'domain "e" has'),
        ("a.jsonl", '{"text": "red"}\n', 'a second file of the domain "a"'),
    ],
)
def test_reconstruct_names_a_domain_that_cannot_be_read(
    refused, reconstruct_recipe, tmp_path, domains, name, content, says
):
    texts = tmp_path / "texts"
    shutil.copytree(domains, texts)
    (texts / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    out = tmp_path / "out"
    recipe = reconstruct_recipe(texts=texts)
    assert says in refused("reconstruct", "--recipe", recipe, "--out", out)
    assert {path.name for path in tmp_path.iterdir()} == {"texts", "reconstruct.toml"}


def test_reconstruct_needs_a_domain_per_expert_and_a_context_that_fits(
    refused, reconstruct_recipe, tmp_path
):
    out = tmp_path / "out"
    message = refused("reconstruct", "--recipe", reconstruct_recipe(), "--out", out, "--experts", 5)
    assert "4" in message
    assert "5" in message
    long = reconstruct_recipe(settings=FAST.replace("length = 32", "length = 257"))
    assert "257" in refused("reconstruct", "--recipe", long, "--out", out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ("[settings]\nexpert = 3\n", 'settings: unknown key "expert"'),
        ('[settings]\nexperts = "3"\n', "settings: experts is '3'"),
        ("[settings]\nkeep = 2.0\n", "keep 2.0 is not a share"),
        ('[settings.score]\nkind = "best"\n', 'score: unknown kind "best"'),
    ],
)
def test_reconstruct_names_a_mistake_in_its_recipe(
    refused, reconstruct_recipe, tmp_path, settings, says
):
    recipe = reconstruct_recipe(settings=settings)
    message = refused("reconstruct", "--recipe", recipe, "--out", tmp_path / "out")
    assert says in message
    assert str(recipe) in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("given", ['"lora"', "3", "[1]"])
def test_a_budget_on_the_command_line_does_not_hide_a_mistake_in_the_recipe(
    refused, reconstruct_recipe, tmp_path, given
):
    recipe = reconstruct_recipe(settings=f"{FAST}[settings.retrain]\nexperts = {given}\n")
    message = refused(
        "reconstruct", "--recipe", recipe, "--retrain", 4096, "--out", tmp_path / "out"
    )
    assert f"{recipe}: settings: retrain: experts is" in message
    assert "it should be a table" in message


def test_reconstruct_refuses_a_budget_below_one_step(refused, reconstruct_recipe, tmp_path):
    given = ("--recipe", reconstruct_recipe(), "--out", tmp_path / "out")
    message = refused("reconstruct", *given, "--retrain", 1000)
    assert "experts.tokens 1000 is less than one step, 2048 tokens" in message


def test_reconstruct_refuses_a_text_that_nothing_is_retrained_on(
    refused, reconstruct_recipe, tmp_path, domains
):
    recipe, out = reconstruct_recipe(), tmp_path / "out"
    message = refused("reconstruct", "--recipe", recipe, "--text", domains, "--out", out)
    assert "nothing is retrained; add a table settings.retrain (--retrain TOKENS)" in message
    assert str(domains) in message
    path = tmp_path / "recipe.toml"
    path.write_text(f'text = "{domains}"\n{recipe.read_text()}', encoding="utf-8")
    assert "nothing is retrained" in refused("reconstruct", "--recipe", path, "--out", out)
    assert not out.exists()


def test_reconstruct_takes_dense_models_only(refused, reconstruct_recipe, moe_dir, tmp_path):
    recipe = reconstruct_recipe(model=moe_dir)
    message = refused("reconstruct", "--recipe", recipe, "--out", tmp_path / "out")
    assert "mixtral" in message.lower()
    assert not (tmp_path / "out").exists()


def test_reconstruct_leaves_what_is_in_its_way(refused, reconstruct_recipe, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    message = refused("reconstruct", "--recipe", reconstruct_recipe(), "--out", out)
    assert str(out) in message
    assert (out / "notes.txt").read_text() == "mine"
    message = refused("reconstruct", "--recipe", reconstruct_recipe(), "--out", out / "notes.txt")
    assert "notes.txt" in message
    assert [path.name for path in out.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "absent", "pickle"])
@pytest.mark.parametrize("command", ["reconstruct", "federate", "evaluate"])
def test_damaged_weights_are_named(
    refused, reconstruct_recipe, settings, tmp_path, dense_dir, moe_dir, domains, damage, command
):
    model = tmp_path / "model"
    shutil.copytree(dense_dir if command == "reconstruct" else moe_dir, model)
    weights = model / "model.safetensors"
    content = weights.read_bytes()
    if damage in ("absent", "pickle"):
        weights.rename(model / "pytorch_model.bin") if damage == "pickle" else weights.unlink()
    else:
        kept = {"truncated": content[:-1000], "garbage": b"\xff" * 4096, "empty": b""}
        weights.write_bytes(kept[damage])
    recipe = federation(tmp_path, replace(settings, model=str(model)))
    out = tmp_path / "out"
    arguments = {
        "reconstruct": ["--recipe", reconstruct_recipe(model=model), "--out", out],
        "federate": [recipe, "--out", out],
        "evaluate": [model, "--text", domains, "--json", out],
    }
    message = refused(command, *arguments[command])
    assert "model.safetensors" in message
    assert str(model) in message
    assert not out.exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("round = 3\n", 'unknown key "round"'),
        ('fraction = "all"\n', "fraction is 'all'"),
        ("fraction = 2.0\n", "fraction 2.0"),
    ],
)
def test_federate_names_a_mistake_in_its_recipe(refused, settings, tmp_path, change, says):
    text = dump(settings).replace("fraction = 1.0\n", "")
    recipe = tmp_path / "federate.toml"
    recipe.write_text(change + text, encoding="utf-8")
    message = refused("federate", recipe, "--out", tmp_path / "run")
    assert says in message
    assert str(recipe) in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "train.jsonl:31: not valid JSON"),
        ('{"instruction": "x", "category": "pears"}', 'train.jsonl:31: the field "response"'),
        ("3", "train.jsonl:31: not a JSON object"),
        ('{"a": ' * 5000 + "1" + "}" * 5000, "train.jsonl:31: nested too deeply"),
        (
            '{"instruction": "x", "response": "\\ud800", "category": "pears"}',
            'train.jsonl:31: the field "response" holds half a character',
        ),
        (
            '{"instruction": "x", "response": "y", "category": "\\udc00"}',
            'train.jsonl:31: the field "category" holds half a character',
        ),
        ('{"\\ud800": "x"}', 'train.jsonl:31: the field "instruction" is missing'),
    ],
)
def test_federate_names_a_broken_row(refused, settings, tmp_path, rows_dir, line, says):
    train = tmp_path / "train.jsonl"
    train.write_text((rows_dir / "train.jsonl").read_text() + line + "\n", encoding="utf-8")
    broken = replace(settings, data=replace(settings.data, train=train))
    assert says in refused("federate", federation(tmp_path, broken), "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_federate_names_what_is_wrong_before_it_writes(
    refused, settings, tmp_path, dense_dir, rows_dir
):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "strange.jsonl").write_text('{"a": 1}\n')
    data = settings.data
    wrong = {
        "none.jsonl": replace(settings, data=replace(data, train=tmp_path / "none.jsonl")),
        "empty.jsonl": replace(settings, data=replace(data, test=tmp_path / "empty.jsonl")),
        "strange.jsonl:1": replace(settings, data=replace(data, test=tmp_path / "strange.jsonl")),
        "gave each of 30 clients 1 train rows and a test row": replace(
            settings, data=replace(data, partition=Dirichlet(30, 0.05))
        ),
        'client "client-': replace(
            settings, data=replace(data, partition=Dirichlet(30, 0.05, minimum=0))
        ),
        'the field "topic" is missing': replace(settings, data=replace(data, category="topic")),
        'train.jsonl:1: the field "q" is missing': replace(
            settings, data=replace(data, format=Mapped("q"))
        ),
        'data set "no/data:train" from the Hub': replace(
            settings, data=replace(data, train="no/data:train")
        ),
        'client "kiwis" has no train rows': replace(
            settings, data=replace(data, partition=ByCategory(("kiwis",)))
        ),
        "max_length 1000 is longer": replace(settings, max_length=1000),
        "no mixture-of-experts layer": replace(settings, model=str(dense_dir)),
        "wqkv": replace(settings, adapter=LoRA(targets=("wqkv",))),
        str(tmp_path / "nowhere"): replace(settings, model=str(tmp_path / "nowhere")),
    }
    run = tmp_path / "run"
    for says, made in wrong.items():
        assert says in refused("federate", federation(tmp_path, made), "--out", run)
        assert not run.exists(), says
    run.mkdir()
    made = wrong["max_length 1000 is longer"]
    refused("federate", federation(tmp_path, made), "--out", run)
    assert list(run.iterdir()) == []


def test_federate_leaves_other_runs_and_files_alone(
    refused, settings, tmp_path, monkeypatch, capsys
):
    run = tmp_path / "run"
    arguments = ["pomona", "federate", str(federation(tmp_path, settings)), "--out", str(run)]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert "results in" in capsys.readouterr().out
    before = contents(run)
    other = federation(tmp_path, replace(settings, rounds=3))
    assert "another recipe" in refused("federate", other, "--out", run)
    assert contents(run) == before
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    assert str(mine) in refused("federate", other, "--out", mine)
    assert str(mine / "notes.txt") in refused("federate", other, "--out", mine / "notes.txt")
    assert contents(mine) == {"notes.txt": b"mine"}


LENGTHS = ("--length", 32, "--length", 64)


def test_evaluate_names_what_it_cannot_use(
    refused, moe_dir, dense_dir, rows_dir, domains, tmp_path
):
    out = tmp_path / "figures.json"
    rows = rows_dir / "test.jsonl"
    (tmp_path / "bad.jsonl").write_text('{"instruction": "x", "response": "y"}\n{\n')
    (tmp_path / "bad.json").write_text("{}")
    (tmp_path / "taken").write_text("mine")
    speed = [moe_dir, "--speed"]
    wrong: dict[str, Sequence[object]] = {
        "give one of --text, --rows, --tasks, --speed to measure, not none": [moe_dir],
        "not --text and --speed": [*speed, "--text", domains],
        "not --rows and --tasks": [moe_dir, "--rows", rows, "--tasks", "mmlu"],
        "--routing goes with --text": [*speed, "--routing"],
        "--figures goes with --routing": [moe_dir, "--text", domains, "--figures", tmp_path],
        "--data goes with --tasks": [*speed, "--data", rows],
        "--fewshot goes with --tasks": [*speed, "--fewshot", 0],
        "--dense goes with --speed": [moe_dir, "--rows", rows, "--dense", moe_dir],
        "--repeats goes with --speed": [moe_dir, "--rows", rows, "--repeats", 2],
        "several lengths are for --text": [moe_dir, "--rows", rows, *LENGTHS],
        "no room for a prompt in length 256": [*speed, "--new-tokens", 256],
        "no room for a prompt in length 64": [*speed, "--length", 64],
        "repeats 0 is too small": [*speed, "--repeats", 0],
        "LlamaForCausalLM has no mixture": [dense_dir, "--text", domains, "--routing"],
        "bad.json is .json data": [moe_dir, "--text", tmp_path / "bad.json"],
        str(tmp_path / "taken/load"): [
            *(moe_dir, "--text", domains, "--routing"),
            *("--figures", tmp_path / "taken/load"),
        ],
        "none.jsonl": [moe_dir, "--rows", tmp_path / "none.jsonl", "--length", 96],
        "bad.jsonl:2": [moe_dir, "--rows", tmp_path / "bad.jsonl", "--length", 96],
        "length 512 is longer": [moe_dir, "--rows", rows, "--length", 512],
        "length 257 is longer": [moe_dir, "--text", domains, "--length", 257],
        "nowhere": [tmp_path / "nowhere", "--text", domains],
        str(tmp_path / "texts"): [moe_dir, "--text", tmp_path / "texts", "--length", 64],
        "*.md": [moe_dir, "--text", tmp_path / "*.md", "--length", 64],
        "graft_config.json": [moe_dir, "--text", domains, "--length", 64, "--graft", tmp_path],
    }
    for says, arguments in wrong.items():
        assert says in refused("evaluate", *arguments, "--json", out)
        assert not out.exists()


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--limit", -1, "limit -1 is too small; use 0 or more"),
        ("--length", -5, "length -5 is too small; use 2 or more"),
        ("--new-tokens", -1, "new tokens -1 is too small; use 0 or more"),
    ],
)
def test_evaluate_takes_no_negative_numbers(refused, moe_dir, rows_dir, option, value, says):
    given = {"--length": 96, "--new-tokens": 2, option: value}
    options = [part for pair in given.items() for part in pair]
    assert says in refused("evaluate", moe_dir, "--rows", rows_dir / "test.jsonl", *options)


@pytest.mark.parametrize("place", ["", "taken", "taken/figures.json", "/proc/self/figures.json"])
def test_evaluate_refuses_a_place_for_its_figures_before_it_measures(
    refused, monkeypatch, moe_dir, domains, tmp_path, place
):
    def measured(*_: object) -> None:
        raise AssertionError("nothing should be measured")

    monkeypatch.setattr("pomona.pipelines.evaluate.on_text", measured)
    (tmp_path / "taken").write_text("mine")
    out = tmp_path if place in ("", "taken") else tmp_path / place
    message = refused("evaluate", moe_dir, "--text", domains, "--json", out)
    assert f"cannot write {out}" in message
    assert contents(tmp_path) == {"taken": b"mine"}


def test_report_names_a_folder_that_is_no_run(refused, tmp_path):
    page = tmp_path / "page.html"
    assert str(tmp_path / "none") in refused("report", tmp_path / "none", "--out", page)
    assert not page.exists()


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond `size` bytes; Python ignores SIGXFSZ itself."""
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [200, 20_000])
def test_reconstruct_on_a_full_disk_leaves_nothing(refused, reconstruct_recipe, tmp_path, size):
    out, recipe = tmp_path / "out", reconstruct_recipe()
    with full_disk(size):
        message = refused("reconstruct", "--recipe", recipe, "--out", out)
    assert f"cannot write {tmp_path}" in message  # OUT, or the hidden folder beside it
    assert "make room" in message
    assert [path.name for path in tmp_path.iterdir()] == ["reconstruct.toml"]


@pytest.mark.parametrize("every", now_and_then([2], [1]))
def test_federate_on_a_full_disk_goes_on_when_there_is_room(
    refused, settings, tmp_path, monkeypatch, capsys, every
):
    """Wherever it is that a write fails, the same command ends with the same bytes later."""
    recipe = federation(tmp_path, settings)
    reached: set[str] = set()

    def finish(run: Path) -> dict[str, bytes]:
        monkeypatch.setattr(sys, "argv", ["pomona", "federate", str(recipe), "--out", str(run)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
        found = contents(run)
        for name in ("timings.jsonl", "run.json"):  # seconds, and the command with its folder
            del found[name]
        return found

    expected = finish(tmp_path / "whole")
    for size in sorted({len(content) - 1 for content in expected.values()})[::every]:
        run = tmp_path / str(size)
        with full_disk(size):
            message = refused("federate", recipe, "--out", run)
        assert "make room" in message
        reached.add(message.partition(str(run))[2].partition(":")[0])
        assert not (run / "results.json").exists()
        assert [path for path in tmp_path.rglob("*") if path.name.endswith(".partial")] == []
        assert finish(run) == expected
    assert len(reached) >= 3, reached


def start(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pomona", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_python_dash_m_ends_a_mistake_in_one_sentence(settings, tmp_path):
    recipe = federation(tmp_path, settings, "round = 3\n")
    done = start("federate", recipe, "--out", tmp_path / "run")
    assert 'unknown key "round"' in sentence(done.returncode, done.stderr)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_python_dash_m_names_a_model_that_is_not_there(tmp_path, domains):
    done = start("evaluate", tmp_path / "nowhere", "--text", domains)
    assert str(tmp_path / "nowhere") in sentence(done.returncode, done.stderr)
