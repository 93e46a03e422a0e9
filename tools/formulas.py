"""A hook of mkdocs: formulas become MathML while the site is built, so that a reader needs no network and no script.

`pymdownx.arithmatex` finds them, written in LaTeX as GitHub has it too: ``$...$``, or ``$$...$$`` as a block.
"""

from __future__ import annotations

import re
from html import unescape
from typing import Any

from latex2mathml.converter import convert

_FORMULA = re.compile(r'<(div|span) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(html: str, **_: Any) -> str:
    """A page with its formulas as MathML."""
    return _FORMULA.sub(_mathml, html)


def _mathml(found: re.Match[str]) -> str:
    tag, latex = found[1], unescape(found[2]).strip()
    if tag == "span":
        return convert(latex)
    return f'<div class="formula">{convert(latex, display="block")}</div>'
