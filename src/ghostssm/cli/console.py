"""What the command prints: results on standard output, progress and errors on standard error."""

from __future__ import annotations

import json
import math
import os
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table

from ghostssm.errors import GhostWarning
from ghostssm.progress import Progress
from ghostssm.units import bytes_text

__all__ = [
    "bytes_text",
    "is_first_process",
    "note",
    "print_error",
    "print_facts",
    "print_json",
    "print_table",
    "progress_reporter",
    "warnings_told",
]

_PLAIN_INTERVAL = 5.0
"""Seconds between progress lines when nobody watches."""
_bars: list[RichProgress] = []
"""What is drawn at the moment."""


def is_first_process() -> bool:
    """Of several processes that share a run, the first reports."""
    return os.environ.get("RANK", "0") == "0"


def print_error(message: str) -> None:
    """An error for the person at the terminal; control characters, which names in files may hold, are spelled out."""
    message = _spelled_out(message)
    Console(stderr=True, soft_wrap=True, highlight=False).print("error:", style="bold red", end=" ")
    told = message if is_first_process() else f"process {os.environ['RANK']}: {message}"
    Console(stderr=True, soft_wrap=True, highlight=False).print(told, markup=False)


@contextmanager
def warnings_told() -> Iterator[None]:
    """Within the context each of our own warnings is a line for the person at the terminal, told once."""
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
    """JSON on standard output; NaN and infinity, for which JSON has no words, become null."""
    if is_first_process():
        print(json.dumps(_finite(value), indent=1, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> None:
    """A table on standard output: ruled on a terminal, aligned plain lines elsewhere. Numbers align right."""
    if sys.stdout.isatty():
        table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        for position, header in enumerate(headers):
            justify: Literal["left", "right"] = "left" if position < text_columns else "right"
            table.add_column(header.replace(", ", "\n"), justify=justify, no_wrap=True, vertical="bottom")
        for row in rows:
            table.add_row(*row)
        console = Console()
        needed = console.measure(table, options=console.options.update(max_width=1000)).maximum
        console.width = max(console.width, needed)  # numbers may wrap, but are never cut off
        console.print(table)
        return
    widths = [max(len(row[i]) for row in (headers, *rows)) for i in range(len(headers))]
    for row in (headers, *rows):
        cells = [
            cell.ljust(width) if position < text_columns else cell.rjust(width)
            for position, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def print_facts(facts: Sequence[tuple[str, str]]) -> None:
    """Aligned lines of name and value; control characters, which files may hold, are spelled out."""
    width = max(len(name) for name, _ in facts)
    if is_first_process():
        for name, value in facts:
            print(f"{name.ljust(width)}  {_spelled_out(value)}")


def note(message: str) -> None:
    """A line for the person at the terminal, kept out of standard output; above the bars, while there are some."""
    if not is_first_process():
        return
    if _bars:
        _bars[-1].console.print(message, markup=False, highlight=False, soft_wrap=True)
    else:
        print(message, file=sys.stderr, flush=True)


@contextmanager
def progress_reporter() -> Iterator[Progress]:
    """A progress listener: bars with the time left on a terminal, a line now and then elsewhere."""
    if not sys.stderr.isatty() or not is_first_process():
        yield _PlainProgress()
        return
    columns = (TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with RichProgress(*columns, console=Console(stderr=True), transient=True) as bars, _shown(bars):
        tasks: dict[str, Any] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            elif not done:
                bars.reset(tasks[what], total=total)  # the time left is that of this round
            bars.update(tasks[what], completed=done, total=total, visible=done < total)

        yield report


@contextmanager
def _shown(bars: RichProgress) -> Iterator[None]:
    _bars.append(bars)
    try:
        yield
    finally:
        _bars.remove(bars)


class _PlainProgress:
    """Lines such as ``layers 3/24, about 40 s left``: at the start, at the end, and every few seconds between. What is
    done again and again, such as the windows of every cell of a table, gets these lines once and then one now and then.
    """

    def __init__(self) -> None:
        self._begun: dict[str, float] = {}
        self._finished: set[str] = set()
        self._last = 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        begun = self._begun.setdefault(what, now)
        between = 0 < done < total or what in self._finished
        if done == total:
            self._begun.pop(what)
            self._finished.add(what)
        if between and now - self._last < _PLAIN_INTERVAL:
            return
        self._last = now
        left = f", about {(now - begun) / done * (total - done):.0f} s left" if 0 < done < total else ""
        note(f"{what} {done}/{total}{left}")
