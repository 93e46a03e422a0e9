"""A figure: an Altair chart over named tables, drawn by Vega in a page, or as an SVG here.

Only what draws imports this package, since its libraries are an extra.

Raises:
    InputError: at the import, where one of the libraries is not installed.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from ghostssm.extras import check_drawable
from ghostssm.workflows.report_record import as_json

check_drawable()
import altair as alt  # noqa: E402
import vl_convert  # noqa: E402

Rows = Sequence[Mapping[str, Any]]
"""A table; all rows have the same keys."""
MOST_CHANNELS = 32_000
"""The most channels of a model that are drawn: a page must stay small and quick."""
INK = alt.param(name="ink", value="#1b1f24")
FAINT = alt.param(name="faint", value="#57606a")
"""Colours of text, and of rules and numbers beside it; a page sets them by its theme."""
COLOURS = ("#1F86C9", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31")
"""After Okabe & Ito (2008), which colour-blind readers can tell apart, without its yellow and black."""
_LOOK = alt.Config(
    font="system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif",
    autosize=alt.AutoSizeParams(type="fit-x", contains="padding"),
    aria=False,
    style={"guide-label": {"fontSize": 12}, "guide-title": {"fontSize": 12, "fontWeight": "normal"}},
    text=alt.MarkConfig(fontSize=12),
    view=alt.ViewConfig(stroke=None),
    axis=alt.AxisConfig(
        domain=False,
        gridColor=FAINT,
        gridOpacity=0.25,
        labelColor=FAINT,
        labelOverlap=True,
        tickColor=FAINT,
        tickOpacity=0.5,
        titleColor=INK,
        titlePadding=8,
    ),
    legend=alt.LegendConfig(
        orient="top",
        columnPadding=14,
        gradientLength=160,
        gradientThickness=10,
        labelColor=INK,
        labelLimit=260,
        symbolStrokeWidth=2,
        titleColor=INK,
    ),
)
"""The look of all figures."""


@dataclass(frozen=True)
class Figure:
    """One figure.

    Attributes:
        name: of the files that it is saved as.
        title, caption: for all readers. description: for those who don't see it.
        chart: over tables that it knows by their names.
        tables: these tables; the first is what the figure shows, and what is saved as CSV.
    """

    name: str
    title: str
    caption: str
    description: str
    chart: alt.LayerChart
    tables: Mapping[str, Rows]

    def spec(self, width: int | None = None) -> dict[str, Any]:
        """The Vega-Lite specification with its data, in four digits; as wide as its place if no width is given."""
        # legends go by the whole width: that of the plot shrinks once they are laid out
        room = alt.param(name="room", expr="width && containerSize()[0]" if width is None else str(width))
        chart = self.chart.add_params(INK, FAINT, room).properties(width=width or "container", config=_LOOK)
        return {**chart.to_dict(), "datasets": as_json(self.tables, 4)}

    def svg(self, width: int = 640) -> str:
        """The figure as it first appears, in the colours of the text around it, light or dark."""
        spec = self.spec(width)
        for param in spec["params"]:
            if param["name"] in (INK.name, FAINT.name):
                param["value"] = "currentColor"
        return vl_convert.vegalite_to_svg(spec | {"background": "transparent"})

    def html(self) -> str:
        """The figure as a notebook shows it."""
        return (
            f'<figure style="margin: 1em 0"><div role="img" aria-label="{escape(self.description)}">{self.svg()}</div>'
            f"<figcaption>{escape(self.caption)}</figcaption></figure>"
        )

    _repr_html_ = html


@functools.cache
def vega_script() -> str:
    """JavaScript that defines ``vegaEmbed``; about 0.9 MB."""
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;").replace("</script", "<\\/script")


def shown_groups(layers: int, n_groups: int, state_size: int) -> int:
    """How many groups of every layer a figure of all channels can show."""
    return max(1, min(n_groups, MOST_CHANNELS // (layers * state_size)))


def table(name: str) -> alt.Chart:
    """A layer over one of a figure's tables."""
    return alt.Chart(alt.NamedData(name))


def rule(name: str) -> alt.Chart:
    """A layer of lines to compare with, at the places in a table."""
    lines: alt.Chart = table(name).mark_rule(strokeDash=[5, 4], color=FAINT)
    return lines


def selector(name: str, options: Sequence[Any], labels: Sequence[str] | None = None) -> alt.Parameter:
    """A choice among options above a figure; it begins with the first."""
    shown = list(map(str, options) if labels is None else labels)
    bind = alt.binding_select(options=list(options), labels=shown, name=f"{name.capitalize()} ")
    return alt.param(name=name, value=options[0], bind=bind)


def chosen(layer: alt.Chart, *selectors: alt.Parameter) -> alt.Chart:
    """A layer with only the rows that the selectors choose; a selector has the name of a column."""
    for parameter in selectors:
        layer = layer.transform_filter(alt.datum[parameter.name] == parameter)
    return layer


def tooltip(**titles: str) -> list[alt.Tooltip]:
    """What hovering shows: the values of fields, each under a title."""
    return [alt.Tooltip(field, type="nominal", title=title) for field, title in titles.items()]


def log_scale(padding: int, base: int = 10) -> alt.Scale:
    """A logarithmic axis that ends ``padding`` pixels beyond the data."""
    return alt.Scale(type="log", base=base, nice=False, padding=padding)


def index_axis(count: int) -> alt.Axis:
    """An axis of places 0 to ``count`` - 1, of which about eight are named."""
    return alt.Axis(values=list(range(0, count, max(1, count // 8))), labelAngle=0, grid=False)


def names_scale(names: Sequence[str], values: Sequence[str]) -> alt.Scale:
    """A colour or shape for each name; they are used again where there are too few."""
    return alt.Scale(domain=list(names), range=[values[index % len(values)] for index in range(len(names))])


def columns(width: int) -> alt.ExprRef:
    """As many columns of a legend, each ``width`` wide, as there is room for."""
    return alt.ExprRef(f"max(1, floor(room / {width}))")


def legend_of(labels: Sequence[str]) -> alt.Legend:
    """A legend above a figure in as many columns as there is room for."""
    return alt.Legend(columns=columns(40 + 7 * max(map(len, labels))))
