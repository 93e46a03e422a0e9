"""What the command prints: results on standard output, errors and warnings on standard error."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any

from rich.console import Console

from ghostssm.errors import GhostWarning
from ghostssm.report.screen import is_first_process, note

_PLAIN_WIDTH = 100
_GAP = "  "


def print_error(message: str) -> None:
    """Print an error; control characters, which names in files may hold, are spelled out."""
    message = _spelled_out(message)
    Console(stderr=True, soft_wrap=True, highlight=False).print("error:", style="bold red", end=" ")
    told = message if is_first_process() else f"process {os.environ['RANK']}: {message}"
    Console(stderr=True, soft_wrap=True, highlight=False).print(told, markup=False)


@contextmanager
def warnings_told() -> Iterator[None]:
    """Within the context our own warnings are printed as lines, each once."""
    told: set[str] = set()
    with warnings.catch_warnings():
        show = warnings.showwarning

        def tell(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if not issubclass(category, GhostWarning):
                show(message, category, *place, **more)
            elif str(message) not in told:
                told.add(str(message))
                note(f"warning: {_spelled_out(str(message))}")

        warnings.simplefilter("always", GhostWarning)
        warnings.showwarning = tell
        yield


def _spelled_out(text: str) -> str:
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def print_json(value: Any) -> None:
    """Print JSON on standard output; NaN and infinity, which JSON does not have, become null."""
    if is_first_process():
        print(json.dumps(_finite(value), indent=1, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> None:
    """Print a table on standard output that fits the terminal, or 100 columns elsewhere. Numbers align right.

    Where it is too wide, headers and texts go on in another line; words and numbers are never broken.
    """
    columns = list(zip(headers, *rows, strict=True))
    natural = [max(map(len, column)) for column in columns]
    unbroken = [max(map(len, (*header.split(), *cells))) for header, *cells in columns]
    least = [max(len(word) for cell in column for word in ("", *cell.split())) for column in columns]
    room = _width() - len(_GAP) * (len(headers) - 1)
    widths = _narrowed(_narrowed(natural, unbroken, room), least, room)  # headers break first
    for index, row in enumerate((headers, *rows)):
        wrapped = [_wrapped(cell, width) for cell, width in zip(row, widths, strict=True)]
        height = max(map(len, wrapped))
        filled = [[""] * (height - len(cell)) + cell if index == 0 else cell for cell in wrapped]
        for line in zip_longest(*filled, fillvalue=""):
            cells = [
                text.ljust(width) if position < text_columns else text.rjust(width)
                for position, (text, width) in enumerate(zip(line, widths, strict=True))
            ]
            print(_GAP.join(cells).rstrip())


def _narrowed(natural: Sequence[int], least: Sequence[int], room: int) -> list[int]:
    """Widths of columns that fit into the room, if their longest words do; the widest columns are narrowed first."""
    widths = list(natural)
    while sum(widths) > room:
        able = [position for position, width in enumerate(widths) if width > least[position]]
        if not able:
            break
        widths[max(able, key=lambda position: widths[position])] -= 1
    return widths


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False) or [""]


def _width() -> int:
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else _PLAIN_WIDTH


def print_text(text: str) -> None:
    """Print a sentence on standard output, wrapped by words as tables are."""
    if is_first_process():
        print("\n".join(_wrapped(_spelled_out(text), _width())))


def print_facts(facts: Sequence[tuple[str, str]]) -> None:
    """Print aligned lines of name and value; control characters, which files may hold, are spelled out."""
    width = max(len(name) for name, _ in facts)
    if is_first_process():
        for name, value in facts:
            print(f"{name.ljust(width)}  {_spelled_out(value)}")
