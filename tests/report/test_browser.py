"""Pages in headless Chromium."""

from __future__ import annotations

import io
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ghostssm.plan.decision import Decision, Selection
from ghostssm.plan.plan import Plan
from ghostssm.report.figures.cost import size_figure
from ghostssm.report.figures.state import hankel_figure
from ghostssm.report.page import Report, Section, html_page
from ghostssm.workflows.compare_result import Row
from ghostssm.workflows.report_record import Observations

_FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)
_READY_SECONDS = 60


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="the browser is driven by selenium")
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("there is no chromium with its chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (*_FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield chrome
    chrome.quit()


def show(browser: Any, page: Path, width: int = 1280, dark: bool = False) -> None:
    features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    browser.get(page.as_uri())
    until = time.monotonic() + _READY_SECONDS
    while browser.execute_script("return document.documentElement.dataset.ready") != "yes":
        assert time.monotonic() < until, browser.get_log("browser")
        time.sleep(0.05)


@pytest.mark.parametrize("name", ["prune", "compare", "distill"])
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_every_figure_is_drawn(browser: Any, pages: dict[str, Path], name: str, width: int, dark: bool) -> None:
    image = pytest.importorskip("PIL.Image", reason="screenshots are read by pillow")
    show(browser, pages[name], width, dark)
    figures = browser.execute_script(
        "return [...document.querySelectorAll('figure')].map((place) => ({"
        " marks: place.querySelectorAll('.mark-rect path, .mark-symbol path, .mark-line path').length,"
        " wide: place.querySelector('.chart svg').getBoundingClientRect().width,"
        " alternative: place.querySelector('[role=img]').ariaLabel}))"
    )
    assert len(figures) == {"prune": 6, "compare": 8, "distill": 3}[name]
    assert all(figure["marks"] >= 3 and len(figure["alternative"]) > 40 for figure in figures)
    assert all(0.7 * width < figure["wide"] <= width for figure in figures)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.get_log("browser") == []
    shot = image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
    colours = shot.getcolors(maxcolors=1 << 24)
    assert len(colours) > 50
    background = max(colours)[1]
    assert max(background) < 60 if dark else min(background) > 200


def test_hover_shows_values_and_a_layer_can_be_chosen(browser: Any, pages: dict[str, Path]) -> None:
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import Select

    show(browser, pages["prune"])
    figure = browser.find_element(By.ID, "phantom")

    def shares() -> str:
        return " ".join(text.text for text in figure.find_elements(By.CSS_SELECTOR, ".mark-text text"))

    first = shares()
    assert "phantom" in first
    assert "corporeal" in first
    Select(figure.find_element(By.TAG_NAME, "select")).select_by_visible_text("2")
    until = time.monotonic() + 10
    while shares() == first:
        assert time.monotonic() < until
        time.sleep(0.05)
    point = figure.find_element(By.CSS_SELECTOR, ".chart .mark-symbol.role-mark path")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", point)
    time.sleep(0.3)
    ActionChains(browser).move_to_element(point).perform()
    tip = browser.find_element(By.ID, "tooltip")
    until = time.monotonic() + 10
    while "weight norm" not in tip.text:
        assert time.monotonic() < until
        time.sleep(0.05)
    assert tip.text.splitlines()[0] == "layer 2"
    browser.execute_script("scrollBy(0, 50)")
    while tip.is_displayed():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_no_row_of_a_legend_is_cut_off_on_a_phone(browser: Any, tmp_path: Path) -> None:
    methods = ["ghost", "random", "output+repair", "balanced+per-layer"]
    rows = [Row("dense", 16, 16, 10.0, 1.0, 0.0, 0.0, 4096, {}, 0.0)]
    rows += [Row(name, 8, 8, 11.0, 1.0, 0.1, 0.01, 2048, {}, 0.0) for name in methods]
    page = tmp_path / "page.html"
    page.write_text(html_page(Report("page", "", [], [Section("", [size_figure(rows)])])))
    show(browser, page, 390)
    chart, *labels = browser.execute_script(
        "return [...document.querySelectorAll('.chart, .role-legend-label text')]"
        ".map((shown) => [shown.textContent, shown.getBoundingClientRect()])"
    )
    assert [name for name, _ in labels] == methods
    for _, box in labels:
        assert chart[1]["top"] <= box["top"]
        assert box["right"] <= chart[1]["right"]


def test_sizes_of_their_own_leave_the_axis_alone_until_a_layer_is_chosen(browser: Any, tmp_path: Path) -> None:
    names = ["layers.0.mixer", "layers.1.mixer"]
    values = {name: torch.arange(8.0, 0.0, -1.0, dtype=torch.float64)[None] for name in names}
    kept = {name: Decision(Selection((tuple(range(size)),))) for name, size in zip(names, (2, 4), strict=True)}
    plan = Plan("ghost", "mamba2", 1, 8, kept, per_layer=True)
    page = tmp_path / "page.html"
    page.write_text(
        html_page(Report("page", "", [], [Section("", [hankel_figure(Observations({}, {}, values, "text", 1), plan)])]))
    )
    show(browser, page)
    assert browser.get_log("browser") == []


def test_theme_and_files(browser: Any, pages: dict[str, Path]) -> None:
    from selenium.webdriver.common.by import By

    show(browser, pages["compare"])
    browser.find_element(By.ID, "theme").click()
    assert browser.execute_script("return document.documentElement.dataset.theme") == "dark"
    browser.execute_script(
        "window.saved = []; URL.createObjectURL = (blob) => { blob.text().then((t) => saved.push(t)); return '#'; };"
    )
    for button in browser.find_elements(By.CSS_SELECTOR, "#sizes .save button"):
        button.click()
    until = time.monotonic() + 10
    while len(saved := browser.execute_script("return window.saved")) < 2:
        assert time.monotonic() < until
        time.sleep(0.05)
    csv, svg = sorted(saved, key=lambda text: text.startswith("<svg"))
    assert csv.startswith("method,size,")
    assert len(csv.splitlines()) == 1 + 4
    assert svg.startswith("<svg")
    assert browser.get_log("browser") == []
