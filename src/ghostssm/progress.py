"""How the library tells what it is doing, without knowing who listens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Protocol

Progress = Callable[[str, int, int], None]
"""Called with (what, steps done, steps in all), first with 0 done; from the thread that does the work."""


def silent(what: str, done: int, total: int) -> None:
    """The listener who does nothing."""


def on_screen(what: str, done: int, total: int) -> None:
    """Stands for the screen, where one was registered and somebody looks at it: the public functions' default."""


def named(progress: Progress, name: str) -> Progress:
    """A listener who tells another one under a name, as in ``ghost, N' = 48 in int8: layers``."""
    return lambda what, done, total: progress(f"{name}: {what}", done, total)


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


class Audience(Protocol):
    """Someone who also wants to hear of what can't be counted, and of how unequal the counted steps are."""

    def stage(self, what: str) -> AbstractContextManager[None]:
        """Within the context the work is this."""
        ...

    def expect(self, what: str, costs: Sequence[float]) -> None:
        """The steps that are going to be told under this name differ in cost, for estimates of the time left."""
        ...


_audience: ContextVar[Audience | None] = ContextVar("audience", default=None)


@contextmanager
def heard_by(audience: Audience) -> Iterator[None]:
    """Within the context an audience hears the stages of whatever this thread does."""
    token = _audience.set(audience)
    try:
        yield
    finally:
        _audience.reset(token)


def stage(what: str) -> AbstractContextManager[None]:
    """Tell that the work within the context is this, such as "loading reference"; no effect where nobody listens."""
    audience = _audience.get()
    return nullcontext() if audience is None else audience.stage(what)


def expect(what: str, costs: Sequence[float]) -> None:
    """Tell what the steps of a count cost beside one another, before the first; no effect where nobody listens."""
    audience = _audience.get()
    if audience is not None:
        audience.expect(what, costs)
