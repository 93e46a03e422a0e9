"""The progress of a long call from Python: one line that is drawn again and again, on a terminal or in a notebook."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from ghostssm.progress import Progress, silent

_PATIENCE = 1.0
"""Seconds before anything is shown: short calls stay without a line."""
_INTERVAL = 0.2


@contextmanager
def progress_line() -> Iterator[Progress]:
    """Within the context a listener that draws on standard error, if somebody can see it; else a silent one."""
    if not _is_watched(sys.stderr) or os.environ.get("RANK", "0") != "0":  # of several processes the first one draws
        yield silent
        return
    line = _Line(sys.stderr)
    try:
        yield line
    finally:
        line.clear()


def _is_watched(stream: TextIO) -> bool:
    return stream.isatty() or type(stream).__module__.startswith("ipykernel")


class _Line:
    """A line such as ``models 1/5, layers 3/24, about 40 s left``; the time left is that of the last count."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._open: dict[str, tuple[int, int, float]] = {}
        self._last = time.monotonic() + _PATIENCE - _INTERVAL
        self._width = 0

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        begun = self._open[what][2] if what in self._open and done else now
        self._open[what] = (done, total, begun)
        if done >= total:
            del self._open[what]
        elif now - self._last >= _INTERVAL:
            self._last = now
            left = f", about {(now - begun) / done * (total - done):.0f} s left" if done else ""
            self._draw(", ".join(f"{name} {at}/{end}" for name, (at, end, _) in self._open.items()) + left)

    def clear(self) -> None:
        """Remove what was drawn."""
        if self._width:
            self._draw("")
            self._stream.write("\r")
            self._stream.flush()

    def _draw(self, text: str) -> None:
        self._stream.write("\r" + text.ljust(self._width))
        self._stream.flush()
        self._width = len(text)
