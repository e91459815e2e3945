"""docs/deploy.md as its reader follows it: every command, unit and file in it is used, on this machine."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT
from loopback import free_port
from running import Process

from pomona.recipe import dump

pytestmark = pytest.mark.processes
TEXT = (ROOT / "docs/deploy.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
INLINE = re.findall(r"`(pomona (?:report|status|evaluate) [^`]+)`", TEXT.replace("\n", " "))


def blocks(language: str) -> list[str]:
    return [text for kind, text in BLOCKS if kind == language]


def commands() -> dict[str, list[str]]:
    """The commands of the page by what they begin with."""
    found = [shlex.split(text.replace("\\\n", " ")) for text in blocks("")]
    return {" ".join(words[:2]): words for words in found}


def test_every_block_of_the_page_is_known():
    assert {kind for kind, _ in BLOCKS} == {"", "toml", "ini", "nginx"}
    # the last is run by test_flwr_run.py
    assert list(commands()) == ["pomona keys", "pomona serve", "pomona join", "flwr run"]
    assert [len(blocks(kind)) for kind in ("toml", "ini", "nginx")] == [1, 2, 1]
    assert [command.split()[1] for command in INLINE] == ["report", "status", "report"]


class Reader:
    """Somebody who follows the page in a folder, with one machine in the place of three."""

    def __init__(self, folder: Path):
        self.folder, self.port = folder, free_port()
        self.processes: list[Process] = []

    def words(self, told: list[str], site: str = "north") -> list[str]:
        """What the page says, at this machine's address."""
        assert told[0].endswith("pomona")
        here = {"coordinator.example.org": "127.0.0.1", "0.0.0.0": "127.0.0.1"}
        words: list[str] = []
        for word in told[1:]:
            for name, own in {**here, "8443": str(self.port), "north": site}.items():
                word = word.replace(name, own)
            words.append(f"state-{site}" if word == "state" else word)
        return [sys.executable, "-m", "pomona", *words]

    def run(self, told: list[str]) -> str:
        words = self.words(told)
        done = subprocess.run(words, cwd=self.folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def start(self, name: str, told: list[str], site: str = "north", more: str = "") -> Process:
        words = [*self.words(told, site), *more.split()]
        process = Process(words, self.folder / f"{name}.txt", cwd=self.folder)
        self.processes.append(process)
        return process


@pytest.fixture
def reader(settings, rows_dir, moe_dir, tmp_path):
    """A folder with what the page takes for granted: a recipe, a model, rows."""
    (tmp_path / "flex.toml").write_text(dump(replace(settings, data=None)), "utf-8")
    (tmp_path / "mixture").symlink_to(moe_dir)
    for split in ("train", "test"):
        rows = (rows_dir / f"{split}.jsonl").read_text("utf-8").splitlines()
        for name, client in (("north", "apples"), ("south", "pears")):
            own = [row for row in rows if json.loads(row)["category"] == client]
            (tmp_path / f"{name}.{split}.jsonl").write_text("\n".join(own), "utf-8")
    reader = Reader(tmp_path)
    yield reader
    for process in reader.processes:
        if process.popen.poll() is None:
            process.kill()
            process.end()


def test_three_machines_from_zero(reader):
    """Keys, the coordinator by its command, one site by its command under a policy, one by its unit."""
    reader.run([*commands()["pomona keys"][:5], "--site", "north", "--site", "south"])
    serving = reader.start("serve", commands()["pomona serve"])
    serving.wait_for("base model ")
    told = re.search(r"recipe (\w{64}), base model\s+(\w{64})", " ".join(serving.said.split()))
    assert told
    policy = tomllib.loads(blocks("toml")[0])
    digests = [*policy["recipes"], *policy["models"]]
    text = blocks("toml")[0]
    for digest, own in zip(digests, told.groups(), strict=True):
        text = text.replace(digest, own)
    (reader.folder / "policy.toml").write_text(text, "utf-8")
    one = reader.start("north", commands()["pomona join"], "north", "--policy policy.toml")
    other = reader.start("south", _exec_start("pomona join"), "south")
    for process in (serving, one, other):
        assert process.end() == 0, process.said
    for line in INLINE:
        reader.run(shlex.split(line.replace("state/run", "state-north/run")))
    assert (reader.folder / "report.html").is_file()
    assert "finished" in reader.run(["pomona", "status", "runs/flex"])
    results = json.loads((reader.folder / "runs/flex/results.json").read_text())
    assert list(results["personal"]["clients"]) == ["north", "south"]
    log = (reader.folder / "runs/flex/serve.log").read_text()
    assert re.search(r'to "north": train of round 1, [\d,]+ bytes', log)
    assert re.search(r'from "south": update of round 3, [\d,]+ bytes', log)


def _exec_start(kind: str) -> list[str]:
    """The command of the unit that runs it."""
    lines = re.findall(r"^ExecStart=(.*)$", "\n".join(blocks("ini")), re.MULTILINE)
    (found,) = [words for words in map(shlex.split, lines) if words[1] == kind.split()[1]]
    return found


def test_units_say_the_same_as_the_page(tmp_path):
    for kind in ("pomona serve", "pomona join"):
        assert _exec_start(kind)[1:] == commands()[kind][1:]
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd is not here")
    for text in blocks("ini"):
        path = tmp_path / Path(text.splitlines()[0].removeprefix("# ")).name
        own = text.replace("/srv/pomona/venv/bin/pomona", sys.executable)
        path.write_text(own.replace("User=pomona", "User=root"), "utf-8")
        command = ["systemd-analyze", "verify", "--man=no", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert path.name not in done.stderr, done.stderr


@pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not here")
def test_through_the_proxy(reader):
    """Sites know the proxy's address alone; TLS and keys are those of the coordinator."""
    (text,) = blocks("nginx")
    inside = reader.port
    reader.run([*commands()["pomona keys"][:5], "--site", "north"])
    proxied = commands()["pomona serve"]
    serving = reader.start("serve", proxied)
    reader.port = free_port()
    text = text.replace("inside.example.org:8443", f"127.0.0.1:{inside}")
    text = text.replace("listen 8443", f"listen 127.0.0.1:{reader.port}")
    folder = reader.folder / "nginx"
    folder.mkdir()
    own = f"daemon off; pid {folder}/pid; error_log {folder}/error.log;\n"
    if os.geteuid() == 0:
        own += "user root;\n"
    (folder / "nginx.conf").write_text(own + text, "utf-8")
    command = ["nginx", "-p", "/usr/lib/nginx", "-c", str(folder / "nginx.conf")]
    proxy = Process(command, folder / "said.txt")
    reader.processes.append(proxy)
    joined = reader.start("north", commands()["pomona join"], "north")
    assert serving.end() == 0, serving.said
    assert joined.end() == 0, joined.said
    assert f"127.0.0.1:{reader.port}" in (reader.folder / "state-north/status.json").read_text()
