"""SIGINT and SIGTERM end a run by an exception, so that it tidies up; both wait while files are put in their places.

Before a run, while libraries are imported, SIGINT ends the process at once. There is nothing to tidy up yet, and an
exception in the midst of an import comes out as a traceback, or aborts the process from within native code.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_INTERRUPTED, EXIT_TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM


class Terminated(SystemExit):
    """SIGTERM arrived; the exit code is the usual one, 143. ``message``: what a person can do next, if anything."""

    def __init__(self, message: str = ""):
        super().__init__(EXIT_TERMINATED)
        self.message = message


def end_at_once() -> None:
    """From now on SIGINT ends the process with a message; no effect where something else has been done about it."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def raise_again() -> None:
    """Undo `end_at_once`: from now on SIGINT raises KeyboardInterrupt."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(_: int, __: FrameType | None) -> None:
    os.write(2, b"error: interrupted; nothing half-written is left.\n")
    os._exit(EXIT_INTERRUPTED)


@contextmanager
def terminable() -> Iterator[None]:
    """Within the context SIGTERM raises Terminated in the main thread; no effect in another thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Within the context SIGINT and SIGTERM wait; at its end they do what they would have done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    handlers = ((number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM))
    before = {number: handler for number, handler in handlers if handler is not None}  # None: not set from Python
    for number in before:
        signal.signal(number, lambda got, _: arrived.append(got))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for late in arrived:
            signal.raise_signal(late)


def _terminate(_: int, __: FrameType | None) -> None:
    raise Terminated
