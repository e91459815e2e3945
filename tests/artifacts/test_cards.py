"""Model cards: what the Hub reads of them, and that their figures are those of the run."""

import json
from dataclasses import replace

import pytest
from conftest import ROOT
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from pomona.artifacts.model_card import card_head
from pomona.artifacts.run import RunDirectory
from pomona.cli.app import app
from pomona.models.lora import LoRA
from pomona.pipelines.federate import federate
from pomona.recipe import dump


def test_a_head_names_the_base_whatever_it_is_called(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# base\n")
    told = ModelCard(card_head("some: #one [x]", tmp_path, "federated")).data
    assert told.base_model == "some: #one [x]"
    assert (told.license, told.tags) == ("cc-by-4.0", ["federated", "pomona"])


@pytest.mark.parametrize("card", ["# no head\n", "---\nlicense: [1\n---\n", "---\nx", None])
def test_a_base_that_names_no_licence_gets_none(tmp_path, card):
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert ModelCard(card_head("base", tmp_path)).data.license is None


def test_an_exported_client_has_the_figures_of_its_run(settings, tmp_path):
    out = tmp_path / "run"
    with RunDirectory.open(out, dump(settings), {"method": "orchard", "seed": 0}) as run:
        results = federate(settings, run, device="cpu")
    words = ["export", settings.model, "--run", str(out), "--client", "pears"]
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "own")])
    assert done.exit_code == 0, done.output
    text = (tmp_path / "own/README.md").read_text("utf-8")
    assert ModelCard(text).data.base_model == settings.model
    rows = results["data"]["train"]["pears"], results["data"]["test"]["pears"]
    assert f"trained on {sum(rows[0])} rows" in text
    assert f"measured on {sum(rows[1])} test rows" in text
    for model in ("base", "shared", "personal"):
        assert f"| {model} | {results[model]['clients']['pears']['loss']:.4f} |" in text
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    sent = [line["sent"] for line in lines if line["model"] == "communication"]
    assert f"sent to the client: {sum(own.get('pears', 0) for own in sent):,} bytes" in text
    modes = {oct(path.stat().st_mode & 0o777) for path in (tmp_path / "own").iterdir()}
    assert len(modes) == 1
    assert str(ROOT) not in text


def test_a_run_and_a_client_stand_for_all_its_parts(settings, moe_dir, tmp_path, rows_dir):
    both = replace(settings, personal=LoRA(2, 4.0))
    with RunDirectory.open(tmp_path / "run", dump(both), {"method": "m", "seed": 0}) as run:
        federate(both, run, device="cpu")
    asked = [
        str(moe_dir),
        "--rows",
        str(rows_dir / "test.jsonl"),
        "--device",
        "cpu",
        "--limit",
        "4",
    ]
    asked += ["--new-tokens", "4"]
    own = tmp_path / "run/clients/pears"
    folders = {
        "adapter": tmp_path / "run/shared",
        "graft": own / "graft",
        "personal": own / "personal",
    }
    ways = {
        "run": ["--run", str(tmp_path / "run"), "--client", "pears"],
        "folders": [word for name, path in folders.items() for word in (f"--{name}", str(path))],
        "forgetful": ["--adapter", str(folders["adapter"]), "--graft", str(folders["graft"])],
    }
    found = {}
    for way, words in ways.items():
        kept = tmp_path / f"{way}.json"
        done = CliRunner().invoke(app, ["evaluate", *asked, *words, "--json", str(kept)])
        assert done.exit_code == 0, done.output
        found[way] = json.loads(kept.read_text())
    assert found["run"] == found["folders"]
    assert found["run"] != found["forgetful"]
    for words, told in (
        (["--run", str(tmp_path / "run")], "--run and --client go together"),
        ([*ways["run"], "--graft", str(folders["graft"])], "--run has the parts"),
        (
            ["--run", str(tmp_path / "run"), "--client", "figs"],
            'no client "figs"; there are apples',
        ),
    ):
        done = CliRunner().invoke(app, ["evaluate", *asked, *words])
        assert done.exit_code == 2 and told in " ".join(done.output.split())
