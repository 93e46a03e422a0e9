"""A report as one HTML file that needs no network: cards, then sections of figures, tables and texts."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from string import Template
from typing import TYPE_CHECKING, Any

from ghostssm._version import __version__
from ghostssm.files.outputs import OutputFile, storing
from ghostssm.progress import stage

if TYPE_CHECKING:
    from ghostssm.report.figures import Figure

_NUMBERS, _NAMES, _WORDS = "numbers", "names", "words"
_LONGEST_NAME = 26


@dataclass(frozen=True)
class Card:
    """One fact in large letters."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of text; without headers a row is a name and its value."""

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


@dataclass(frozen=True)
class Texts:
    """Longer texts, such as commands, each under its label."""

    title: str
    texts: Mapping[str, str]
    caption: str = ""


@dataclass(frozen=True)
class Section:
    """Figures, tables and texts under one heading."""

    title: str
    parts: Sequence[Figure | Table | Texts]


@dataclass(frozen=True)
class Report:
    """All that a page shows.

    Attributes:
        missing: pairs of what could not be shown and the command that adds it.
        details: JSON values by the title under which they are shown.
    """

    title: str
    subtitle: str
    cards: Sequence[Card]
    sections: Sequence[Section]
    missing: Sequence[tuple[str, str]] = ()
    details: Mapping[str, Any] | None = None

    @property
    def figures(self) -> list[Figure]:
        """The figures of all sections."""
        parts = (part for section in self.sections for part in section.parts)
        return [part for part in parts if not isinstance(part, Table | Texts)]


def html_page(report: Report) -> str:
    """A report's page.

    Raises:
        InputError: the libraries that draw are not installed.
    """
    from ghostssm.report.figures import vega_script

    figures = list(map(_figure_json, report.figures))
    packed = gzip.compress(json.dumps(figures, separators=(",", ":"), allow_nan=False).encode(), mtime=0)
    details = "".join(
        f'<details class="panel"><summary>{escape(title)}</summary>'
        f"<pre>{escape(json.dumps(value, indent=1, ensure_ascii=False))}</pre></details>\n"
        for title, value in (report.details or {}).items()
    )
    return Template(_asset("page.html")).substitute(
        version=__version__,
        title=escape(report.title),
        subtitle=escape(report.subtitle),
        cards="\n".join(map(_card_html, report.cards)),
        missing=_missing_html(report.missing),
        sections="\n".join(map(_section_html, report.sections)),
        details=details,
        data=base64.b64encode(packed).decode(),
        style=_asset("page.css"),
        vega=vega_script(),
        script=_asset("page.js"),
    )


def table_html(table: Table) -> str:
    """A table that scrolls where it is too wide."""
    kinds = [_kind(column) if table.headers else _WORDS for column in zip(*table.rows, strict=True)]

    def line(tag: str, cells: Sequence[str]) -> str:
        shown = zip(cells, kinds or [_NUMBERS] * len(cells), strict=True)
        return "".join(f'<{tag} class="{kind}">{escape(cell)}</{tag}>' for cell, kind in shown)

    head = f"<thead><tr>{line('th', table.headers)}</tr></thead>" if table.headers else ""
    body = "".join(f"<tr>{line('td', row)}</tr>" for row in table.rows)
    return f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>'


def _kind(column: Sequence[str]) -> str:
    """The CSS class of a column: sentences may be broken into lines, and only numbers are aligned right."""
    if any(len(cell) > _LONGEST_NAME for cell in column):
        return _WORDS
    return _NUMBERS if any(cell[:1].isdigit() for cell in column) else _NAMES


def _asset(name: str) -> str:
    return (resources.files("ghostssm") / "report" / "assets" / name).read_text(encoding="utf-8")


def _card_html(card: Card) -> str:
    note = f'<div class="note">{escape(card.note)}</div>' if card.note else ""
    return (
        f'<div class="card"><div class="label">{escape(card.label)}</div>'
        f'<div class="value">{escape(card.value)}</div>{note}</div>'
    )


def _section_html(section: Section) -> str:
    parts = "\n".join(
        _panel_html(part) if isinstance(part, Table | Texts) else _figure_html(part) for part in section.parts
    )
    return f"<section><h2>{escape(section.title)}</h2>\n{parts}\n</section>" if section.parts else ""


def _panel_html(part: Table | Texts) -> str:
    if isinstance(part, Table):
        shown = table_html(part)
    else:
        shown = "".join(f"<h4>{escape(label)}</h4><pre>{escape(text)}</pre>" for label, text in part.texts.items())
    caption = part.caption and f'<p class="caption">{escape(part.caption)}</p>'
    return f'<div class="panel"><h3>{escape(part.title)}</h3>{shown}{caption}</div>'


def _figure_html(figure: Figure) -> str:
    title = escape(figure.title)
    buttons = "".join(
        f'<button type="button" class="save-{kind}" aria-label="Save {title} as {kind.upper()}">{kind.upper()}</button>'
        for kind in ("svg", "csv")
    )
    return (
        f'<figure id="{figure.name}"><div class="figure-head"><h3>{title}</h3><div class="save">{buttons}</div></div>'
        f'<div class="choices"></div><div role="img" aria-label="{escape(figure.description)}">'
        '<div class="chart"></div></div>'
        f"<figcaption>{escape(figure.caption)}</figcaption></figure>"
    )


def _figure_json(figure: Figure) -> dict[str, Any]:
    """What the page's script draws: the tables by their columns, which compress better than rows."""
    spec = figure.spec()
    tables = {name: {key: [row[key] for row in rows] for key in rows[0]} for name, rows in spec.pop("datasets").items()}
    return {"name": figure.name, "spec": spec, "tables": tables}


def _missing_html(missing: Sequence[tuple[str, str]]) -> str:
    if not missing:
        return ""
    lines = "".join(f"<li>{escape(what)}: <code>{escape(command)}</code></li>" for what, command in missing)
    return f'<section class="missing"><p>Not shown, and what adds it:</p><ul>{lines}</ul></section>'


def write_page(file: OutputFile, report: Report) -> None:
    """Write a report's page, whole or not at all.

    Raises:
        StorageError: writing failed; nothing is left behind.
    """
    with stage("drawing figures"):
        page = html_page(report)
    with file, storing(file.path):
        file.partial.write_text(page, encoding="utf-8")
        file.commit()
