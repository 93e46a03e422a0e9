"""How the library tells what it is doing, without knowing who listens."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with (what, steps done, steps in all), first with 0 done; from the thread that does the work."""


def silent(what: str, done: int, total: int) -> None:
    """The listener who does nothing."""


Notify = Callable[[str], None]
"""Called with a sentence for the person who waits."""


def unheard(message: str) -> None:
    """The listener who hears no sentence."""
