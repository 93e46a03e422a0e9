"""How Jupyter shows plans and comparisons: a table, and a figure where the libraries that draw are installed."""

from __future__ import annotations

import sys
from html import escape

from ghostssm.errors import InputError
from ghostssm.plan.plan import Plan
from ghostssm.report.page import Table, table_html
from ghostssm.report.showing import figure_of
from ghostssm.units import sizes_text, text_name
from ghostssm.workflows.compare_result import Comparison, comparison_cells


def register_with_ipython() -> None:
    """Have IPython, if it runs us, show plans and comparisons with the functions below."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if shell is not None:
        formatter = shell.display_formatter.formatters["text/html"]
        formatter.for_type(Plan, plan_html)
        formatter.for_type(Comparison, comparison_html)


def plan_html(plan: Plan) -> str:
    """What was decided, in a table, and the scores as a heat map."""
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
    """All rows as a table, and perplexity against state size."""
    table = table_html(Table("", *comparison_cells(comparison.rows)))
    return table + (_figure_html(comparison) if len(comparison.rows) > 1 else "")


def _figure_html(shown: Plan | Comparison) -> str:
    try:
        figure = figure_of(shown)
    except InputError as error:
        return f"<p>{escape(str(error))}</p>"
    return figure.html()
