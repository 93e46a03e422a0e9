"""SIGINT and SIGTERM: both end a run by an exception, so that what was begun is tidied up, and neither in its midst."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_TERMINATED = 128 + signal.SIGTERM


class Terminated(SystemExit):
    """SIGTERM arrived; the exit code is the usual one, 143. ``message``: what a person can do next, if anything."""

    def __init__(self, message: str = ""):
        super().__init__(EXIT_TERMINATED)
        self.message = message


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
