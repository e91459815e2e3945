"""The site as mkdocs builds it: without a warning, whole, and without a request to anybody."""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = pytest.mark.docs
ELSEWHERE = r"[\"']?(?:https?:)?//"
REQUESTS = (
    re.compile(rf"<(?:script|img|iframe|source|video|audio)\b[^>]*?\bsrc={ELSEWHERE}"),
    re.compile(rf"<link\b(?![^>]*\brel=[\"']?(?:canonical|next|prev))[^>]*?\bhref={ELSEWHERE}"),
    re.compile(rf"(?:url\(|@import\s*){ELSEWHERE}"),
)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_is_there(site):
    for page in (ROOT / "docs").rglob("*.md"):
        assert (site / page.relative_to(ROOT / "docs")).with_suffix(".html").is_file(), page
    assert (site / "benchmarks/results/scale.svg").is_file()  # a page names it


def test_what_is_generated_is_there(site):
    settings = (site / "settings.html").read_text("utf-8")
    assert "secure_aggregation" in settings and "trimmed-mean" in settings
    assert "--layers-at-once" in (site / "cli.html").read_text("utf-8")
    assert "pomona.api.federate" in (site / "api.html").read_text("utf-8")
    assert "generated:" not in settings


def test_equations_are_mathml(site):
    methods = (site / "methods.html").read_text("utf-8")
    assert methods.count("<math") > 10
    assert "arithmatex" not in methods and "merror" not in methods


def test_nothing_is_asked_of_anybody(site):
    files = [*site.rglob("*.html"), *site.rglob("*.css")]
    assert len(files) > 30
    for file in files:
        text = file.read_text("utf-8")
        assert not any(request.search(text) for request in REQUESTS), file
