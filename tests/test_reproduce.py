"""docs/reproduce.md: its commands run, its recipes are there, its figures are those of a dry run."""

import json
import re
import shlex

import pytest
from conftest import ROOT, word_text
from transformers import Qwen2MoeConfig

from pomona.cli.app import main
from pomona.federation.settings import FederateSettings
from pomona.recipe import read_recipe

DOCUMENT = (ROOT / "docs/reproduce.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", DOCUMENT, re.S)
    for line in block.splitlines()
    if line.startswith("pomona ")
]
TASKS = ("closed_qa", "information_extraction", "classification", "summarization")
DEEPSEEK = Qwen2MoeConfig(
    vocab_size=102400,
    intermediate_size=10944,
    num_hidden_layers=28,
    max_position_embeddings=4096,
    mlp_only_layers=[0],
    qkv_bias=False,
    shared_expert_intermediate_size=2816,
    num_experts_per_tok=6,
    num_experts=64,
    dtype="bfloat16",
)
SHAPES = {"qwen1.5-moe": Qwen2MoeConfig(dtype="bfloat16"), "deepseek-moe": DEEPSEEK}


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """Five rows of every task, where the recipes look for Dolly."""
    folder = tmp_path / "data/dolly-15k"
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        made = [
            {"instruction": word_text(i, 4), "context": "", "response": word_text(i + 9, 3)}
            | {"category": task}
            for task in TASKS
            for i in range(5)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in made))
    monkeypatch.setenv("POMONA_DATA", str(tmp_path / "data"))


def run(monkeypatch, capsys, *arguments) -> str:
    monkeypatch.setattr("sys.argv", ["pomona", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    assert not ended.value.code, err
    return out


def test_commands_and_recipes_were_found():
    named = set(re.findall(r"recipes/[\w.-]+\.toml", DOCUMENT))
    assert len(named) == 4
    assert all((ROOT / name).is_file() for name in named)
    assert {shlex.split(line)[1] for line in COMMANDS} == {
        "federate",
        "reconstruct",
        "report",
        "judge",
    }
    assert len(COMMANDS) == 10
    for path in re.findall(r"\b(?:scripts|docs)/[\w.]+\.\w+", DOCUMENT):
        assert (ROOT / path).is_file()


@pytest.mark.parametrize("name", SHAPES)
def test_the_figures_are_those_of_a_dry_run(rows, tmp_path, monkeypatch, capsys, name):
    SHAPES[name].save_pretrained(tmp_path / "shape")
    (line,) = (line for line in COMMANDS if name in line and "--dry-run" in line)
    given = [ROOT / word if word.startswith("recipes/") else word for word in shlex.split(line)[1:]]
    told = run(monkeypatch, capsys, *given, "--model", tmp_path / "shape")
    blocks = re.findall(r"```text\n(.*?)```", DOCUMENT, re.S)
    assert told in blocks
    assert len(blocks) == len(SHAPES)


@pytest.mark.parametrize(
    "line",
    [line for line in COMMANDS if "dry" in line or "--out runs" in line or "reconstruct" in line],
)
def test_every_command_runs_dry_on_a_tiny_model(
    rows, moe_dir, dense_dir, tmp_path, monkeypatch, capsys, line
):
    words = shlex.split(line)[1:]
    recipe = next(word for word in words if word.startswith("recipes/"))
    copy = tmp_path / "recipe.toml"  # the tiny models have a context of 256 tokens
    words[words.index(recipe)] = str(copy)
    text = (ROOT / recipe).read_text()
    if words[0] == "reconstruct":
        copy.write_text(text.replace("length = 1024", "length = 256"))
        domains = tmp_path / "my-domains"
        domains.mkdir()
        for number in range(8):
            (domains / f"{number}.txt").write_text(word_text(number, 50))
        words[1] = str(dense_dir)
        monkeypatch.chdir(tmp_path)
    else:
        copy.write_text(re.sub(r"new_tokens = \d+", "new_tokens = 8", text.replace("2048", "256")))
        words += ["--model", str(moe_dir)]
    before = sorted(tmp_path.rglob("*"))
    told = run(monkeypatch, capsys, *words, *([] if "--dry-run" in words else ["--dry-run"]))
    assert "parameters" in told
    assert sorted(tmp_path.rglob("*")) == before


def test_both_recipes_are_flex_as_published(rows):
    """They differ from flex-faithful in their model, in what fits a smaller memory, and in asking MMLU."""
    from dataclasses import replace

    faithful = read_recipe(ROOT / "recipes/flex-faithful.toml", FederateSettings)
    for name in SHAPES:
        own = read_recipe(ROOT / f"recipes/flex-{name}.toml", FederateSettings)
        assert own == replace(
            faithful,
            name=f"flex-{name}",
            model=own.model,
            cohort=1,
            checkpointing=True,
            evaluation=replace(
                faithful.evaluation,
                batch=4,
                tasks=("mmlu",),
                task_data=own.data.train.parents[1] / "mmlu",
                fewshot=5,
                limit=0,
            ),
        )
