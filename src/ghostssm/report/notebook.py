"""How Jupyter shows plans and comparisons: a table, and a figure where the libraries that draw are installed."""

from __future__ import annotations

import sys
from html import escape

from ghostssm.errors import InputError
from ghostssm.plan.plan import Plan
from ghostssm.report.page import Table, table_html
from ghostssm.report.plans import has_scores, kept_share, sizes_text
from ghostssm.units import text_name
from ghostssm.workflows.compare import Comparison
from ghostssm.workflows.comparison_table import comparison_cells


def register_with_ipython() -> None:
    """Have the notebook or IPython shell that runs us, if any, show plans and comparisons with these functions."""
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
        ["state size", f"{plan.state_size} → {sizes_text(plan)}"],
        ["state kept", f"{kept_share(plan):.1%}"],
    ]
    calibration = plan.provenance.get("calibration")
    if isinstance(calibration, dict):
        windows = f"{calibration.get('windows')} windows of {calibration.get('window_length')} tokens of "
        rows.append(["calibrated on", windows + text_name(str(calibration.get("text")))])
    return table_html(Table("", ["plan", ""], rows)) + (_figure_html(plan) if has_scores(plan) else "")


def comparison_html(comparison: Comparison) -> str:
    """All rows as a table, and perplexity against state size."""
    table = table_html(Table("", *comparison_cells(comparison.rows)))
    return table + (_figure_html(comparison) if len(comparison.rows) > 1 else "")


def _figure_html(shown: Plan | Comparison) -> str:
    try:
        from ghostssm.report.figures.cost import size_figure
        from ghostssm.report.figures.state import saliency_figure
    except InputError as error:
        return f"<p>{escape(str(error))}</p>"
    figure = saliency_figure({shown.method: shown}) if isinstance(shown, Plan) else size_figure(shown.rows)
    return (
        f'<figure><div role="img" aria-label="{escape(figure.description)}">{figure.svg()}</div>'
        f"<figcaption>{escape(figure.caption)}</figcaption></figure>"
    )
