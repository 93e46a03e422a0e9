"""What is shown on standard error while a command or a long call works: what it does, how far it is, how long it takes.

Of a command, a terminal shows bars. Elsewhere there are lines: one within a second, and one at least every five seconds
after. Of a call from Python, a terminal or a notebook shows one line, which is drawn again and again.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TextIO, TypeVar

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from ghostssm.progress import Progress, heard_by, silent
from ghostssm.units import duration_text

_FIRST_LINE, _INTERVAL, _TICK = 0.4, 4.5, 0.2
"""Seconds before a stage is told, between two lines, and between two looks at the clock. A line comes a tick late."""
_PATIENCE, _REDRAWN = 1.0, 0.2
"""Seconds before a call from Python shows its line, so that short calls have none; and between two drawings of it."""
_UNNAMED = "working"
_RECENT = 0.7
"""The share of the time so far after which steps are recent."""
Outcome = TypeVar("Outcome")


class Count:
    """How many steps are done, and how long the rest will take.

    The steps may differ in cost. The time per cost is learnt from all steps and from the recent ones, and the slower of
    the two is taken: a machine may become slower, when others load it as well.
    """

    def __init__(self, total: int, costs: Sequence[float] = ()):
        self.total = total
        self._costs = costs if len(costs) == total else [1.0] * total
        self._marks = [(time.monotonic(), 0)]

    @property
    def begun(self) -> float:
        return self._marks[0][0]

    def reach(self, done: int) -> None:
        """Note that so many steps are done by now."""
        self._marks.append((time.monotonic(), done))

    @property
    def steps(self) -> str:
        """Such as "3/24"."""
        return f"{self._marks[-1][1]}/{self.total}"

    @property
    def text(self) -> str:
        """Such as "3/24, about 40 s left"."""
        seconds = self.seconds_left()
        return self.steps if seconds is None else f"{self.steps}, about {duration_text(seconds)} left"

    def seconds_left(self) -> float | None:
        """How long the rest will take from now on; None before the first step and after the last."""
        (begun, _), (last, done) = self._marks[0], self._marks[-1]
        if not 0 < done < self.total:
            return None
        recently = max(mark for mark in self._marks if mark[0] <= begun + _RECENT * (last - begun))
        rates = [
            (last - since) / cost
            for since, before in (self._marks[0], recently)
            if (cost := sum(self._costs[before:done])) > 0
        ]
        after_this = max(rates) * sum(self._costs[done + 1 :])  # a step that takes longer than expected ends soon
        return max(max(rates) * sum(self._costs[done:]) - (time.monotonic() - last), after_this)


_screens: list[Bars | Lines] = []
"""The screen of the command that runs; empty outside of one."""


def is_first_process() -> bool:
    """Of several processes that share a run, the first reports."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def watched() -> Iterator[None]:
    """Within the context of a command, the person at the terminal is told what is going on."""
    if sys.stderr.isatty() and is_first_process():
        with _in_front(Bars()):
            yield
        return
    lines, ended = Lines(), threading.Event()

    def look() -> None:
        while not ended.wait(_TICK):
            lines.look()

    looking = threading.Thread(target=look, daemon=True)
    with _in_front(lines):
        looking.start()
        try:
            yield
        finally:
            ended.set()
            looking.join()


@contextmanager
def _in_front(screen: Bars | Lines) -> Iterator[None]:
    _screens.append(screen)
    try:
        with heard_by(screen):
            yield
    finally:
        _screens.remove(screen)


@contextmanager
def progress_reporter() -> Iterator[Progress]:
    """Within the context a progress listener for what is counted."""
    with nullcontext() if _screens else watched(), _screens[-1].shown():
        yield _screens[-1].progress


def carried_out(use_case: Callable[..., Outcome], request: object) -> Outcome:
    """The outcome of a request; the person at the terminal sees the progress and what there is to know."""
    with progress_reporter() as progress:
        return use_case(request, progress=progress, notify=note)


def note(message: str) -> None:
    """A line for the person at the terminal, on standard error; above the bars while there are some."""
    if is_first_process():
        (_screens[-1] if _screens else Lines()).say(message)


class _Counting:
    """What is counted, by name."""

    def __init__(self) -> None:
        self._counts: dict[str, Count] = {}
        self._costs: dict[str, Sequence[float]] = {}

    def expect(self, what: str, costs: Sequence[float]) -> None:
        """The steps of a count are going to cost this."""
        self._costs[what] = costs

    def _reached(self, what: str, done: int, total: int) -> Count:
        """The count with so many steps done; it begins anew when none are."""
        if not done or what not in self._counts:
            self._counts[what] = Count(total, self._costs.get(what, ()))
        self._counts[what].reach(done)
        return self._counts[what]


class _Told(ProgressColumn):
    """How far a count is by now, and how long the rest takes."""

    def render(self, task: Task) -> Text:
        count: Count | None = task.fields["count"]
        return Text("" if count is None else count.text)


class Bars(_Counting):
    """Bars with the time left, which are gone when the work is done."""

    def __init__(self) -> None:
        super().__init__()
        self._bars: RichProgress | None = None
        self._tasks: dict[str, TaskID] = {}

    @contextmanager
    def shown(self) -> Iterator[None]:
        if self._bars is not None:
            yield
            return
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            _Told(),
            TimeElapsedColumn(),
        )
        console = Console(stderr=True)
        with RichProgress(*columns, console=console, transient=True, redirect_stdout=False) as bars:
            self._bars, self._tasks, self._counts = bars, {}, {}
            try:
                yield
            finally:
                self._bars = None

    @contextmanager
    def stage(self, what: str) -> Iterator[None]:
        with self.shown():
            assert self._bars is not None
            task = self._bars.add_task(what, total=None, count=None)
            try:
                yield
            finally:
                self._bars.remove_task(task)

    def progress(self, what: str, done: int, total: int) -> None:
        assert self._bars is not None
        count = self._reached(what, done, total)
        if not done and what in self._tasks:  # a new round has a new bar
            self._bars.remove_task(self._tasks.pop(what))
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(what, total=total, count=count)
        self._bars.update(self._tasks[what], completed=done, total=total, visible=done < total)

    def say(self, message: str) -> None:
        if self._bars is None:
            print(message, file=sys.stderr, flush=True)
        else:
            self._bars.console.print(message, markup=False, highlight=False, soft_wrap=True)


class Lines(_Counting):
    """Lines such as ``layers 3/24, about 40 s left``: at the start, at the end, and every few seconds between.

    What is counted again and again, such as the windows of every cell of a table, has all these lines the first time
    only.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.RLock()
        self._stages: list[_Stage] = [_Stage(_UNNAMED)]
        self._finished: set[str] = set()
        self._said = time.monotonic()

    def shown(self) -> AbstractContextManager[None]:
        return self.stage("")

    @contextmanager
    def stage(self, what: str) -> Iterator[None]:
        depth = len(self._stages)
        with self._lock:
            self._stages.append(_Stage(what or self._stages[-1].what))
        try:
            yield
        finally:
            with self._lock:
                del self._stages[depth:]

    def progress(self, what: str, done: int, total: int) -> None:
        with self._lock:
            count = self._reached(what, done, total)
            between = 0 < done < total or what in self._finished
            counted = _Stage(what, told=True, begun=count.begun, count=count)
            self._stages[-1] = counted if done < total else _Stage(_UNNAMED)
            if done == total:
                self._finished.add(what)
            if not between or time.monotonic() - self._said >= _INTERVAL:
                self.say(f"{what} {count.text}")

    def look(self) -> None:
        """Tell what is going on, if that is due."""
        with self._lock:
            current, now = self._stages[-1], time.monotonic()
            lasted = now - current.begun
            if not current.told and lasted >= _FIRST_LINE:
                current.told = True
                self.say(f"{current.what} ...")
            elif now - self._said >= _INTERVAL:
                self.say(current.text)

    def say(self, message: str) -> None:
        with self._lock:
            self._said = time.monotonic()
            if is_first_process():
                print(message, file=sys.stderr, flush=True)


@dataclass
class _Stage:
    """What is going on since when, whether it was told, and how far it is if that is counted."""

    what: str
    told: bool = False
    begun: float = field(default_factory=lambda: time.monotonic())  # noqa: PLW0108  (tests put a clock of theirs there)
    count: Count | None = None

    @property
    def text(self) -> str:
        """With how long the rest takes, or before the first step how long it has taken."""
        what = self.what if self.count is None else f"{self.what} {self.count.text}"
        if self.count is not None and self.count.seconds_left() is not None:
            return what
        return f"{what}, {duration_text(time.monotonic() - self.begun)} so far"


@contextmanager
def progress_line() -> Iterator[Progress]:
    """Within the context of a call from Python, a listener that draws one line; a silent one if nobody can see it."""
    seen = sys.stderr.isatty() or type(sys.stderr).__module__.startswith("ipykernel")
    if not seen or not is_first_process():
        yield silent
        return
    line = _Line(sys.stderr)
    try:
        yield line
    finally:
        line.clear()


class _Line(_Counting):
    """A line such as ``models 1/5, layers 3/24, about 40 s left``; the time left is that of the last count."""

    def __init__(self, stream: TextIO):
        super().__init__()
        self._stream = stream
        self._drawn = time.monotonic() + _PATIENCE - _REDRAWN
        self._width = 0

    def __call__(self, what: str, done: int, total: int) -> None:
        self._reached(what, done, total)
        now = time.monotonic()
        if done >= total:
            del self._counts[what]
        elif now - self._drawn >= _REDRAWN:
            self._drawn = now
            *outer, (name, count) = self._counts.items()
            self._draw(", ".join([*(f"{each} {its.steps}" for each, its in outer), f"{name} {count.text}"]))

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
