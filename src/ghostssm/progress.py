"""How the library tells what it is doing, without knowing who listens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

Progress = Callable[[str, int, int], None]
"""Called with (what, steps done, steps in all), first with 0 done; from the thread that does the work."""


def silent(what: str, done: int, total: int) -> None:
    """The listener who does nothing."""


def on_screen(what: str, done: int, total: int) -> None:
    """Stands for the screen, where one was registered and somebody looks at it: the public functions' default."""


_screens: list[Callable[[], AbstractContextManager[Progress]]] = []


def register_screen(screen: Callable[[], AbstractContextManager[Progress]]) -> None:
    """Have a screen shown for `on_screen`; it gives a listener for the time of one call."""
    _screens[:] = [screen]


@contextmanager
def listening(progress: Progress | None) -> Iterator[Progress]:
    """Within the context of a call, who is told: nobody for None, the registered screen for `on_screen`."""
    if progress is on_screen and _screens:
        with _screens[0]() as shown:
            yield shown
    else:
        yield progress or silent


Notify = Callable[[str], None]
"""Called with a sentence for the person who waits."""


def unheard(message: str) -> None:
    """The listener who hears no sentence."""
