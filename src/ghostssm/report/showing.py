"""What a person asks to see of a plan, a comparison or a checkpoint: a chart, a page, or a notebook's output.

These are functions and not methods of what they show: a value knows no screen, and the figures' libraries are an extra.
"""

from __future__ import annotations

import sys
from html import escape
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ghostssm.errors import InputError
from ghostssm.files.outputs import OutputFile
from ghostssm.plan.plan import Plan
from ghostssm.report.page import Table, table_html, write_page
from ghostssm.units import sizes_text, text_name
from ghostssm.values import short
from ghostssm.workflows.compare_result import Comparison, comparison_cells

if TYPE_CHECKING:
    from ghostssm.report.figures import Figure


def figure_of(shown: Plan | Comparison) -> Figure:
    """A plan's scores as a heat map, or the perplexities of a comparison against the state sizes.

    Raises:
        InputError: something else, nothing to draw, or a library that draws is not installed.
    """
    from ghostssm.report.figures.cost import size_figure
    from ghostssm.report.figures.state import saliency_figure

    if isinstance(shown, Plan) and shown.has_scores:
        return saliency_figure({shown.method: shown})
    if isinstance(shown, Comparison) and len(shown.rows) > 1:
        return size_figure(shown.rows)
    raise InputError(
        f"Found {short(shown)}; expected a comparison with a method in it or a plan with scores: "
        "ghostssm.plot(ghostssm.compare(model, text, state_sizes=[64]))."
    )


def plot(shown: Plan | Comparison, width: int = 640) -> Any:
    """An Altair chart, which a notebook shows and ``.save("figure.svg")`` writes.

    Args:
        shown: a plan, of which it has the scores; or a comparison: excess losses against bytes of state.
        width: in pixels.

    Raises:
        InputError: as `figure_of`; ``pip install 'ghostssm[report]'`` brings the libraries.
    """
    figure = figure_of(shown)
    import altair

    return altair.Chart.from_dict(figure.spec(width))


def write_report(shown: Comparison | str | PathLike[str], output: str | PathLike[str], overwrite: bool = False) -> Path:
    """Write an HTML page about a comparison, or about the folder of a checkpoint that ghostssm wrote.

    Args:
        shown: a comparison, or the folder of a checkpoint. A comparison made with ``report=True`` also has what the
            dense model's state does.
        output: the page to write.
        overwrite: replace a file that is there.

    Returns:
        where the page is.

    Raises:
        InputError: something else, or a library that draws is not installed.
        OutputError: the page is there already, or can't be written.
        StorageError: writing failed; nothing is left behind.
    """
    file = OutputFile(Path(output), overwrite)
    from ghostssm.report.building import checkpoint_report, comparison_report

    if isinstance(shown, Comparison) and shown.basis is not None:
        write_page(file, comparison_report(shown))
    elif isinstance(shown, str | PathLike):
        write_page(file, checkpoint_report(Path(shown)))
    else:
        raise InputError(f"Found {short(shown)}; expected what ghostssm.compare returns, or a checkpoint's folder.")
    return file.path


def register_with_ipython() -> None:
    """Show plans and comparisons by the functions below, if the code runs in IPython."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if shell is not None:
        formatter = shell.display_formatter.formatters["text/html"]
        formatter.for_type(Plan, plan_html)
        formatter.for_type(Comparison, comparison_html)


def plan_html(plan: Plan) -> str:
    """A plan in a notebook: a table of what was decided, and the scores as a heat map."""
    rows = [
        ["method", plan.method],
        ["model type", plan.model_type],
        ["layers", str(len(plan.selections))],
        ["state size", f"{plan.state_size} → {sizes_text(plan.state_sizes)}"],
        ["state kept", f"{plan.kept_share:.1%}"],
    ]
    if plan.provenance is not None:
        seen = plan.provenance.calibration
        words = f"{seen.windows} windows of {seen.window_length} tokens of {text_name(seen.text)}"
        rows.append(["calibrated on", words])
    return table_html(Table("", ["plan", ""], rows)) + (_figure_html(plan) if plan.has_scores else "")


def comparison_html(comparison: Comparison) -> str:
    """A comparison in a notebook: the table of all rows, and loss against bytes of state."""
    table = table_html(Table("", *comparison_cells(comparison.rows)))
    return table + (_figure_html(comparison) if len(comparison.rows) > 1 else "")


def _figure_html(shown: Plan | Comparison) -> str:
    try:
        figure = figure_of(shown)
    except InputError as error:
        return f"<p>{escape(str(error))}</p>"
    return figure.html()
