"""What is shown while a command works, and how its tables fit."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ghostssm.cli import console
from ghostssm.progress import expect, stage
from ghostssm.report import screen


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in seconds, that tests move on."""
    now = [0.0]
    monkeypatch.setattr(screen.time, "monotonic", lambda: now[0])
    return now


def test_lines(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    lines = screen.Lines()
    for done in range(5):
        lines.progress("layers", done, 4)
        clock[0] += 3
    for done in range(5):  # a second round says little
        lines.progress("layers", done, 4)
        clock[0] += 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "layers 0/4",
        "layers 2/4, about 6 s left",
        "layers 4/4",
        "layers 2/4, about 2 s left",
    ]


def test_a_line_at_least_every_five_seconds(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    lines, silent, said = screen.Lines(), 0.0, False
    with lines.stage("reading a"):  # soon over
        clock[0] += 0.2
        lines.look()
    assert capsys.readouterr().err == ""
    with lines.stage("loading b"), lines.shown():
        for tick in range(200):
            clock[0] += 0.2
            if tick == 100:
                lines.progress("layers", 0, 2)
            lines.look()
            told = capsys.readouterr().err
            said = said or bool(told)
            silent = 0.0 if told else silent + 0.2
            assert silent < 5.0
            assert tick != 4 or said, "within a second"
            assert not told or ("loading b" if tick < 100 else "layers 0/2") in told


def test_a_command_that_works_is_seen_within_a_second(capsys: pytest.CaptureFixture[str]) -> None:
    with screen.watched(), stage("loading c"):
        time.sleep(0.9)
        assert capsys.readouterr().err == "loading c ...\n"


def test_the_time_left_weighs_steps_by_their_cost(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with screen._in_front(screen.Lines()):
        expect("models", [1, 1, 10, 20])
        with screen.progress_reporter() as progress:
            for done, seconds in enumerate((5, 5, 50, 100)):
                progress("models", done, 4)
                clock[0] += seconds
    assert capsys.readouterr().err.splitlines() == [
        "models 0/4",
        "models 1/4, about 3 min left",
        "models 2/4, about 2 min left",
        "models 3/4, about 2 min left",
    ]


def test_between_steps_the_time_left_is_told_again(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    lines = screen.Lines()
    for done in range(4):
        lines.progress("layers", done, 10)
        for _ in range(20):
            clock[0] += 0.2
            lines.look()
    told = capsys.readouterr().err.splitlines()
    assert told[:2] == ["layers 0/10", "layers 1/10, about 35 s left"]  # of 36 at the step
    assert all(line.endswith(" left") for line in told[1:])


def test_within_a_step_the_time_left_runs_down_to_that_of_the_later_steps(clock: list[float]) -> None:
    count = screen.Count(4)
    clock[0] += 30
    count.reach(1)
    told = [count.seconds_left()]
    for _ in range(4):
        clock[0] += 10
        told.append(count.seconds_left())
    assert told == [90, 80, 70, 60, 60]
    clock[0] += 10
    count.reach(2)
    left = count.seconds_left()
    assert left is not None
    assert left >= 80, "a step that took 50 s"


def test_the_time_left_follows_a_machine_that_becomes_slow(clock: list[float]) -> None:
    count = screen.Count(100)
    for done in range(1, 61):
        clock[0] += 1 if done <= 40 else 4
        count.reach(done)
    left = count.seconds_left()
    assert left is not None
    assert left > 0.9 * 40 * 4


def test_bars_on_a_terminal_start_anew_each_round(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    class Kept(screen.RichProgress):
        def __init__(self, *arguments: Any, **options: Any):
            super().__init__(*arguments, **options)
            made.append(self)

    monkeypatch.setattr(screen.sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(screen, "RichProgress", Kept)
    with screen.progress_reporter() as progress:
        progress("windows", 0, 4)
        progress("windows", 4, 4)
        assert made[0].tasks[0].finished
        with stage("loading d"):
            assert [task.description for task in made[0].tasks] == ["windows", "loading d"]
        progress("windows", 0, 8)
        (task,) = made[0].tasks
        assert (task.completed, task.total, task.finished) == (0, 8, False)
        progress("windows", 2, 8)
        told = screen._Told().render(task).plain
        assert told.startswith("2/8, about ")
        assert len(made) == 1


CELLS = st.text("abcdefg 0123", min_size=1, max_size=30)


@given(st.lists(st.tuples(CELLS, CELLS, CELLS), min_size=2, max_size=5), st.integers(20, 100))
def test_tables_wrap_by_words(rows: list[tuple[str, str, str]], width: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr(console, "_width", lambda: width)
        patch.setattr("builtins.print", printed.append)
        console.print_table(rows[0], rows[1:])
    words = sorted(word for row in rows for cell in row for word in cell.split())
    assert sorted(" ".join(printed).split()) == words, "no word is broken or lost"
    longest = sum(max(len(word) for row in rows for word in ("", *row[i].split())) for i in range(3)) + 4
    assert max(map(len, printed)) <= max(width, longest)


def test_headers_wrap_before_numbers_do(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(console, "_width", lambda: 40)
    console.print_table(["N'", "tokens per second", "times faster"], [["64", "1,234 ±5%", "1.07 (1.00 to 1.34)"]])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 40
    assert "1,234 ±5%  1.07 (1.00 to 1.34)" in lines[-1]
