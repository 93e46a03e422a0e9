"""How Jupyter shows plans and comparisons: a table, and a figure where the plotting library is installed."""

from __future__ import annotations

import sys
from html import escape

from ghostssm.errors import InputError
from ghostssm.plan.plan import Plan
from ghostssm.report.building import comparison_table
from ghostssm.report.cost_figures import size_figure
from ghostssm.report.figure import Figure
from ghostssm.report.page import Table, table_html
from ghostssm.report.state_figures import has_scores, kept_share, saliency_figure
from ghostssm.units import sizes_text, text_name
from ghostssm.workflows.compare import Comparison


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
        ["state kept", f"{kept_share(plan):.1%}"],
    ]
    if plan.provenance is not None:
        seen = plan.provenance.calibration
        words = f"{seen.windows} windows of {seen.window_length} tokens of {text_name(seen.text)}"
        rows.append(["calibrated on", words])
    figures = [saliency_figure({plan.method: plan})] if has_scores(plan) else []
    return table_html(Table("", ["plan", ""], rows)) + "".join(map(_figure_html, figures))


def comparison_html(comparison: Comparison) -> str:
    """All rows as a table, and perplexity against state size."""
    figures = [size_figure(comparison.rows)] if len(comparison.rows) > 1 else []
    return table_html(comparison_table(comparison.rows)) + "".join(map(_figure_html, figures))


def _figure_html(figure: Figure) -> str:
    try:
        svg = figure.svg()
    except InputError as error:
        return f"<p>{escape(str(error))}</p>"
    return (
        f'<figure><div role="img" aria-label="{escape(figure.description)}">{svg}</div>'
        f"<figcaption>{escape(figure.caption)}</figcaption></figure>"
    )
