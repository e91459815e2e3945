"""The examples run as their reader runs them, one on what the other has made; so do the notebooks."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

EXAMPLES = ROOT / "examples"


def run(name: str, *words: object) -> str:
    command = [sys.executable, str(EXAMPLES / name), *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_scripts_from_the_first_to_the_last(tmp_path):
    scripts = sorted(path.name for path in EXAMPLES.glob("*.py"))
    assert [name[0] for name in scripts] == list("12345")
    first, second, third, fourth, fifth = scripts
    told = run(first, tmp_path)
    assert told.count("was pruned for") == 4
    mixture = tmp_path / "mixture"
    told = run(second, mixture, tmp_path)
    assert [line.split()[0] for line in told.splitlines()[-3:]] == ["base", "shared", "personal"]
    assert (tmp_path / "report.html").is_file()
    houses = sorted(path.name for path in (tmp_path / "run/clients").iterdir())
    assert len(houses) == 4
    losses = [
        float(line.split(":")[1])
        for line in run(third, mixture, tmp_path / "run", houses[0]).splitlines()
        if line.startswith("step")
    ]
    assert len(losses) == 3 and losses[2] < losses[0]
    told = run(fourth, mixture, tmp_path / "clients", tmp_path / "momentum")
    figures = dict(item.split(": ") for item in told.splitlines()[-1].strip("{}").split(", "))
    assert float(figures["'shared'"]) < float(figures["'base'"])
    told = run(fifth, mixture, tmp_path / "run")
    names = [line.split(":")[0] for line in told.splitlines()]  # an answer may have several lines
    assert [name for name in names if name in houses] == houses


@pytest.mark.parametrize(
    "name", [pytest.param("tour.ipynb", marks=pytest.mark.slow), "figures.ipynb"]
)
def test_a_notebook_runs(name, tmp_path, monkeypatch):
    monkeypatch.setenv("POMONA_QUICK", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    assert sorted(path.name for path in EXAMPLES.glob("*.ipynb")) == ["figures.ipynb", "tour.ipynb"]
    notebook = nbformat.read(EXAMPLES / name, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # committed without results
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    assert Path(tmp_path).is_dir()
