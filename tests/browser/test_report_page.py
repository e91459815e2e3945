"""The report in a real browser: nothing asked of anybody, nothing cut off, every figure read and saved."""

import base64
import csv
import io
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from conftest import ROOT

from pomona.artifacts.report import write_report
from pomona.artifacts.run import RunDirectory
from pomona.federation.clients import ClientData
from pomona.federation.evaluation import Evaluation
from pomona.federation.graft import Graft
from pomona.federation.local import LocalTraining
from pomona.federation.settings import FederateSettings
from pomona.federation.strategies import LocalOnly
from pomona.models.lora import LoRA
from pomona.pipelines.federate import federate
from pomona.recipe import dump

pytestmark = pytest.mark.browser
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
AXE = ROOT / "build/axe/node_modules/axe-core/axe.min.js"


@pytest.fixture(scope="module")
def report(moe_dir: Path, rows_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two methods, one of them with two seeds."""
    folder = tmp_path_factory.mktemp("report")
    flex = FederateSettings(
        model=str(moe_dir),
        data=ClientData(train=rows_dir / "train.jsonl", test=rows_dir / "test.jsonl"),
        name="flex",
        rounds=3,
        max_length=96,
        adapter=LoRA(2, 4.0),
        graft=Graft(rank=2),
        local=LocalTraining(steps=2, batch=2),
        evaluation=Evaluation(every=1, answers=2, new_tokens=3),
    )
    alone = replace(flex, name="local-only", graft=None, strategy=LocalOnly())
    for number, settings in enumerate((flex, replace(flex, seed=1), alone)):
        about = {"command": ["pomona"], "method": settings.name, "seed": settings.seed}
        with RunDirectory.open(folder / str(number), dump(settings), about) as run:
            federate(settings, run, device="cpu")
    write_report([folder / str(number) for number in range(3)], folder / "report.html")
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    """Headless Chromium that saves into a folder of its own (`browser.saved`)."""
    if CHROMIUM is None or DRIVER is None or not AXE.is_file():
        pytest.skip("Chromium, its driver or axe-core is not here; `make browser` says how")
    from selenium.webdriver import Chrome, ChromeOptions, ChromeService

    options, saved = ChromeOptions(), tmp_path_factory.mktemp("saved")
    options.binary_location = CHROMIUM
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(word)
    wanted = {
        "download.default_directory": str(saved),
        "profile.default_content_setting_values.automatic_downloads": 1,
    }
    options.add_experimental_option("prefs", wanted)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = Chrome(options, ChromeService(DRIVER))
    opened.saved = saved
    yield opened
    opened.quit()


@pytest.fixture(params=["light", "dark"])
def page(browser, report: Path, request):
    """The page in one of its colours."""
    feature = {"name": "prefers-color-scheme", "value": request.param}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    browser.get(report.as_uri())
    return browser


def sized(browser, width: int) -> None:
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def test_nothing_is_asked_of_anybody_and_nothing_goes_wrong(page, report):
    assert [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"] == []
    asked = {
        told["params"]["request"]["url"]
        for entry in page.get_log("performance")
        if (told := json.loads(entry["message"])["message"])["method"]
        == "Network.requestWillBeSent"
    }
    assert {url for url in asked if not url.startswith("data:")} <= {report.as_uri()}


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_page(page, width):
    sized(page, width)
    inner, outer = page.execute_script(
        "const d = document.documentElement; return [d.scrollWidth, d.clientWidth]"
    )
    assert inner <= outer <= width


def test_every_figure_is_there_and_has_a_name(page):
    sized(page, 390)
    figures = page.execute_script(
        "return [...document.querySelectorAll('figure svg')].map(svg => {"
        "const box = svg.getBoundingClientRect();"
        "return [svg.getAttribute('aria-label'), box.width, box.height, box.right]})"
    )
    assert len(figures) >= 10
    for label, width, height, right in figures:
        assert label.strip() and "From " in label
        assert width > 200 and height > 60 and right <= 390


def test_it_can_be_read_by_everybody(page):
    """axe-core: WCAG 2.2 A and AA, contrast among it."""
    sized(page, 1280)
    page.execute_script(AXE.read_text("utf-8"))
    found = page.execute_async_script(
        "const done = arguments[0];"
        "axe.run({runOnly: ['wcag2a', 'wcag2aa', 'wcag21aa', 'wcag22aa', 'best-practice']})"
        ".then(r => done(r.violations.map(v => [v.id, v.help, v.nodes.map(n => n.html.slice(0, 200))])))"
    )
    assert found == []


def test_every_figure_and_table_is_saved(page, report):
    buttons = page.find_elements("css selector", ".save button")
    names = [b.get_attribute("aria-label").removeprefix("save ") for b in buttons]
    assert len(names) == len(set(names)) >= 20
    kept = {name: page.saved / name for name in names}
    for button, path in zip(buttons, kept.values(), strict=True):
        page.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
        button.click()  # as a person does: Chromium drops some of many that a script begins
        end = time.monotonic() + 20
        while not path.is_file() and time.monotonic() < end:
            time.sleep(0.02)
    for name, path in kept.items():
        text = path.read_text("utf-8")
        if name.endswith(".svg"):
            assert ElementTree.fromstring(text).tag.endswith("svg")
            continue
        rows = list(csv.reader(io.StringIO(text)))
        assert len(rows) > 1 and len({len(row) for row in rows}) == 1, name
    losses = next(p for n, p in kept.items() if n.startswith("convergence") and n.endswith("csv"))
    rows = list(csv.DictReader(io.StringIO(losses.read_text("utf-8"))))
    lines = [
        json.loads(line) for line in (report.parent / "0/metrics.jsonl").read_text().splitlines()
    ]
    theirs = {
        (line["client"], str(line["round"]), line["loss"])
        for line in lines
        if line["model"] == "personal"
    }
    ours = {
        (row["client"], row["round"], float(row["loss"]))
        for row in rows
        if (row["method"], row["seed"], row["model"]) == ("flex", "0", "personal")
    }
    assert ours == theirs
    for path in kept.values():
        path.unlink()


def test_on_paper_there_are_no_buttons_and_nothing_is_cut(browser, report, tmp_path):
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    browser.get(report.as_uri())
    sized(browser, 794)  # A4 at 96 dpi
    shown = "return [...document.querySelectorAll('.save')].filter(s => s.offsetParent).length"
    assert browser.execute_script(shown) == 0
    wide = (
        "return [...document.querySelectorAll('figure svg, table')]"
        ".map(one => one.getBoundingClientRect().right - document.documentElement.clientWidth)"
    )
    assert max(browser.execute_script(wide)) <= 0
    printed = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {})["data"])
    assert printed.startswith(b"%PDF") and len(printed) > 50_000
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
