"""Plans and comparisons as Jupyter shows them."""

from __future__ import annotations

import re
import warnings
from html import escape
from pathlib import Path

import pytest

from ghostssm.plan.plan import Plan
from ghostssm.report.showing import comparison_html, plan_html
from ghostssm.workflows.compare_result import Comparison, Row

_CELLS = """
import ghostssm
from ghostssm.workflows.compare_result import Comparison, Row
plan = ghostssm.Plan.read(__import__("pathlib").Path({folder!r}))
plan
---
dense = Row("dense", 16, 16, 10.0, 1.0, 0.0, 0.0, 4096, {{1: 10.0}}, 0.0)
half = Row("ghost", 8, 8, 11.0, 1.1, 0.1, 0.01, 2048, {{1: 15.0}}, 1.0)
Comparison((dense, half), {{}})
"""


def test_a_notebook_shows_tables_and_figures(pages: dict[str, Path]) -> None:
    nbformat = pytest.importorskip("nbformat", reason="notebooks need nbclient and ipykernel")
    nbclient = pytest.importorskip("nbclient", reason="notebooks need nbclient and ipykernel")
    pytest.importorskip("ipykernel", reason="notebooks need nbclient and ipykernel")
    cells = _CELLS.format(folder=str(pages["folder"])).split("---")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell.strip()) for cell in cells])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the client's own event loop
        nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    shown = [output["data"]["text/html"] for cell in notebook.cells for output in cell.outputs if "data" in output]
    assert len(shown) == 2
    assert "16 → 4" in shown[0]
    assert "0.1000 ± 0.0100" in shown[1]
    for html in shown:
        assert len(re.findall("<path", html)) > 2, "the figure is drawn"
        inks = re.findall('<text [^>]*fill="(.*?)"', html)
        assert inks
        assert set(inks) == {"currentColor"}, "light on dark and dark on light, as the text around it"
        assert not re.search('class="background"[^>]*fill="(?!transparent)', html)


@pytest.mark.usefixtures("without_library")
def test_without_the_libraries_that_draw_there_are_tables(pages: dict[str, Path]) -> None:
    html = plan_html(Plan.read(pages["folder"]))
    assert "<table>" in html
    assert "<svg" not in html
    assert escape("pip install 'ghostssm[report]'") in html
    row = Row("<dense>", 16, 16, 10.0, 1.0, 0.0, 0.0, 4096, {}, 0.0)
    assert "&lt;dense&gt;" in comparison_html(Comparison((row,), {}))
