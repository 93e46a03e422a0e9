"""A figure: a Vega-Lite specification and its data, drawn by Vega in a page, or as an SVG here."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from ghostssm.errors import InputError

Columns = Mapping[str, Sequence[Any]]
"""A table by its columns, all of one length."""
MOST_CHANNELS = 32_000
"""So many channels of a model are drawn at most: a page must stay small and quick."""


_INKS = [{"name": "ink", "value": "#1b1f24"}, {"name": "faint", "value": "#57606a"}]
"""Colours of text and rules that stand among the marks; a page sets them by its theme."""

RULE = {"type": "rule", "strokeDash": [5, 4], "color": {"expr": "faint"}}
"""The mark of a line to compare with."""


@dataclass(frozen=True)
class Figure:
    """One figure.

    Attributes:
        name: of the files that it is saved as.
        title, caption: for all readers. description: for those who don't see it.
        spec: Vega-Lite, whose data are named tables; its marks may take the colours ``ink`` and ``faint``.
        tables: these tables; the first is what the figure shows, and what is saved as CSV.
    """

    name: str
    title: str
    caption: str
    description: str
    spec: Mapping[str, Any]
    tables: Mapping[str, Columns]

    def as_json(self) -> dict[str, Any]:
        """JSON values: the specification as Vega, as wide as its place in the page, and the tables' columns.

        Raises:
            InputError: the package vl-convert-python is not installed.
        """
        spec = {**self.spec, "params": [*self.spec["params"], *_INKS], "width": "container"}
        spec = _placed(spec, lambda columns: {"expr": f"max(1, floor(width / {columns.width}))"})
        vega = converter().vegalite_to_vega(spec, config=vega_config())
        return {"name": self.name, "spec": vega, "tables": self._rounded_tables()}

    def _rounded_tables(self) -> dict[str, dict[str, list[Any]]]:
        """Numbers with four digits, which is what can be seen."""
        return {name: {key: _rounded(values) for key, values in table.items()} for name, table in self.tables.items()}

    def svg(self, width: int = 640) -> str:
        """The figure as it first appears.

        Raises:
            InputError: the package vl-convert-python is not installed.
        """
        datasets = {
            name: [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]
            for name, table in self._rounded_tables().items()
        }
        spec = {**self.spec, "params": [*self.spec["params"], *_INKS], "datasets": datasets, "width": width}
        svg: str = converter().vegalite_to_svg(
            _placed(spec, lambda columns: max(1, width // columns.width)),
            config={**vega_config(), "background": "white"},
        )
        return svg


def converter() -> Any:
    """The package that holds Vega.

    Raises:
        InputError: it is not installed.
    """
    try:
        import vl_convert
    except ModuleNotFoundError:
        raise InputError(
            "A report's figures need the package vl-convert-python, which is not installed; "
            "install it with: pip install vl-convert-python."
        ) from None
    return vl_convert


def vega_config() -> dict[str, Any]:
    """The look of all figures, but for the colours that a page's theme sets."""
    config: dict[str, Any] = json.loads(asset("vega-config.json"))
    return config


def asset(name: str) -> str:
    """The text of a file beside this one."""
    return (resources.files("ghostssm") / "report" / "assets" / name).read_text(encoding="utf-8")


@functools.cache
def vega_script() -> str:
    """JavaScript that defines ``vegaEmbed``; about 0.9 MB.

    Raises:
        InputError: the package that holds them is not installed.
    """
    script: str = converter().javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return script.replace("</script", "<\\/script")


def shown_groups(layers: int, n_groups: int, state_size: int) -> int:
    """How many groups of every layer a figure of all channels can show."""
    return max(1, min(n_groups, MOST_CHANNELS // (layers * state_size)))


def selector(name: str, label: str, options: Sequence[Any], labels: Sequence[str] | None = None) -> dict[str, Any]:
    """A choice among options above a figure, the first of them at first."""
    bind: dict[str, Any] = {"input": "select", "name": f"{label} ", "options": list(options)}
    if labels is not None:
        bind["labels"] = list(labels)
    return {"name": name, "value": options[0], "bind": bind}


def tooltip(**titles: str) -> list[dict[str, str]]:
    """What hovering shows: field to title; numbers with four digits."""
    return [{"field": field, "title": title} for field, title in titles.items()]


def quantity(field: str, title: str, scale: Mapping[str, Any] | None = None, **axis: Any) -> dict[str, Any]:
    """The encoding of a number along an axis."""
    return {
        "field": field,
        "type": "quantitative",
        "title": title,
        "scale": {"zero": False, **(scale or {})},
        "axis": axis,
    }


@dataclass(frozen=True)
class LegendColumns:
    """As many columns of a legend as there is room for, each ``width`` wide; a number once the figure's is known."""

    width: int


def legend_of(labels: Sequence[str]) -> dict[str, Any]:
    """A legend above a figure in as many columns as there is room for."""
    return {"columns": LegendColumns(40 + 7 * max(map(len, labels)))}


def _placed(spec: Any, columns: Callable[[LegendColumns], Any]) -> Any:
    """A specification as JSON values, with what stands for the columns of its legends."""
    if isinstance(spec, LegendColumns):
        return columns(spec)
    if isinstance(spec, Mapping):
        return {key: _placed(value, columns) for key, value in spec.items()}
    return [_placed(value, columns) for value in spec] if isinstance(spec, list) else spec


def _rounded(values: Sequence[Any]) -> list[Any]:
    return [
        (float(f"{value:.4g}") if math.isfinite(value) else None) if isinstance(value, float) else value
        for value in values
    ]
