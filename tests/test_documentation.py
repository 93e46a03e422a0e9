"""The documentation site: it builds, every public name is in it, and every parameter has a description."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import ghostssm
from tests.report.test_browser import browser  # noqa: F401  (a fixture)

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
NAMES = [name for name in ghostssm.__all__ if name != "__version__"]
_ENTRY = re.compile(r"^    (\w+): ", re.MULTILINE)


def described(value: Any) -> set[str]:
    """The names that the docstring of a function, or of a class, its bases and its ``__init__``, has entries for."""
    owners = [value] if inspect.isfunction(value) else [*inspect.getmro(value)[:-1], value.__init__]
    found: set[str] = set()
    for owner in owners:
        text = inspect.cleandoc(vars(owner).get("__doc__") or "") if inspect.isclass(owner) else inspect.getdoc(owner)
        for section in re.findall(r"^(?:Args|Attributes):\n((?:    .*\n?|\n)*)", text or "", re.MULTILINE):
            found.update(_ENTRY.findall(section))
    return found


def parameters(value: Any) -> set[str]:
    return {name for name in inspect.signature(value).parameters if not name.startswith("_")} - {"self", "cls"}


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_is_described(name: str) -> None:
    value = getattr(ghostssm, name)
    if inspect.isclass(value) and issubclass(value, BaseException):  # are caught, not made
        return
    assert parameters(value) <= described(value)


@pytest.mark.parametrize("name", NAMES)
def test_a_method_that_describes_parameters_describes_all(name: str) -> None:
    value = getattr(ghostssm, name)
    methods = [] if not inspect.isclass(value) else [each for each in vars(value).values() if inspect.isfunction(each)]
    for method in methods:
        if known := described(method):
            assert parameters(method) <= known, method.__qualname__


def test_several_parameters_in_one_entry_are_seen() -> None:
    def call(first: int, second: int, third: int) -> None:
        """Do.

        Args:
            first, second: not read as entries by mkdocstrings.
            third: of these. first: hidden in the entry before.
        """

    assert parameters(call) - described(call) == {"first", "second"}


def test_every_public_name_has_one_entry() -> None:
    pages = [page.read_text(encoding="utf-8") for page in sorted((DOCS / "reference").glob("*.md"))]
    entries = re.findall(r"^::: ghostssm\.(\w+)$", "\n".join(pages), flags=re.MULTILINE)
    assert sorted(entries) == NAMES


def rows_of(text: str) -> dict[str, list[str]]:
    """The cells of a page's tables, by the recipe in the first."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:3] == "| `"]
    return {first.strip("`"): rest for first, *rest in cells}


def test_methods_are_told_with_the_figures_that_were_measured() -> None:
    """The share of GHOST's loss at N' = 64 over the models of the benchmarks, and the seconds that a plan takes."""
    measured = (DOCS / "benchmarks.md").read_text(encoding="utf-8")
    fidelity = measured[: measured.index("What a plan costs")].split("\n**")
    models = [rows for part in fidelity if "ghost" in (rows := rows_of(part))]
    assert len(models) == 3
    costs = rows_of(measured[measured.index("What a plan costs") : measured.index("Out of domain")])
    told = rows_of((DOCS / "methods.md").read_text(encoding="utf-8"))
    assert {"ghost", "output+refit100+repair", "balanced+per-layer"} <= set(told)
    for recipe, cells in told.items():
        shares = [match[1] for rows in models if (match := re.search(r"\((\d+\.\d+)\)", rows[recipe][0]))]
        expected = f"{min(shares, key=float)} to {max(shares, key=float)}" if shares else "1"
        assert expected in cells, f"{recipe}: docs/benchmarks.md has {expected}"
        if len(cells) == 4:
            assert cells[2] == costs[recipe][0], f"{recipe}: docs/benchmarks.md has {costs[recipe][0]} seconds"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; every link and anchor was checked."""
    for module in ("mkdocs", "mkdocstrings_handlers.python", "latex2mathml"):
        pytest.importorskip(module, reason="needs the extra 'docs'")
    folder = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site_has_every_name_and_sets_every_formula(site: Path) -> None:
    reference = "".join(page.read_text(encoding="utf-8") for page in (site / "reference").rglob("*.html"))
    assert [name for name in NAMES if f'id="ghostssm.{name}"' not in reference] == []
    methods = (site / "methods" / "index.html").read_text(encoding="utf-8")
    blocks = (DOCS / "methods.md").read_text(encoding="utf-8").count("\n$$\n") // 2
    assert methods.count('<div class="formula"><math') == blocks > 0
    assert "arithmatex" not in methods


def test_no_page_scrolls_sideways_on_a_phone(site: Path, browser: Any) -> None:  # noqa: F811
    screen = {"width": 390, "height": 900, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    for page in sorted(site.rglob("index.html")):
        browser.get(page.as_uri())
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 390, page
    browser.get((site / "methods" / "index.html").as_uri())
    scrolling = browser.execute_script(
        "return [...document.querySelectorAll('.md-content *')]"
        ".filter((each) => each.scrollWidth > each.clientWidth + 1 && each.clientWidth > 0)"
        ".filter((each) => ['auto', 'scroll'].includes(getComputedStyle(each).overflowX)).length"
    )
    assert scrolling == 0
