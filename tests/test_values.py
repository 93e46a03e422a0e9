"""Public values print in a line or two, and compare whatever they hold; long calls tell how far they are."""

from __future__ import annotations

import dataclasses
import io
import math
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest
import torch

import ghostssm
from ghostssm.report import screen
from ghostssm.values import same
from tests.conftest import random_windows, tiny_model

WINDOWS = random_windows(4, 48)


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One of every public value of some size."""
    folder = tmp_path_factory.mktemp("values") / "out"
    model = tiny_model(num_hidden_layers=40)
    outcome = ghostssm.prune(model, WINDOWS, state_size=8, recipe="ghost", evaluate=WINDOWS, output=folder)
    projected = ghostssm.Calibration(tiny_model(), WINDOWS).plan("balanced", 8)
    assert outcome.checkpoint is not None
    name, decision = next(iter(projected.decisions.items()))
    assert projected.provenance is not None
    found = {
        "text": ghostssm.Text.from_strings([f"line {n}\n" * 1000 for n in range(1000)]),
        "windows": WINDOWS,
        "model": ghostssm.evaluate(model, WINDOWS),
        "plan": outcome.plan,
        "projected": projected,
        "decision": decision,
        "selection": outcome.plan.selections[next(iter(outcome.plan.selections))],
        "projection": projected.projections[name],
        "provenance": projected.provenance,
        "seen": projected.provenance.calibration,
        "outcome": outcome,
        "request": ghostssm.PruneRequest("m" * 500, "o", calibration="c" * 5000),
        "checkpoint": outcome.checkpoint,
        "source": ghostssm.find_source(str(folder)),
        "streamed": ghostssm.stream(str(folder)),
        "description": ghostssm.describe(str(folder)),
        "manifest": ghostssm.Manifest.read(folder),
        "verification": ghostssm.verify(folder),
        "measurement": outcome.measured,
        "layout": ghostssm.describe(str(folder)).layout,
        "method": ghostssm.method_named("balanced"),
        "recipe": ghostssm.Recipe.parse("output+refit100+repair"),
        "advice": ghostssm.advise(ghostssm.describe(str(folder)).layout, "mamba2")[0],
        "cut": ghostssm.Cut(8),
    }
    return found


def test_values_print_in_a_line_or_two(values: dict[str, Any]) -> None:
    lengths = {name: (len(repr(value)), repr(value).count("\n")) for name, value in values.items()}
    assert {name: found for name, found in lengths.items() if found[0] > 320 or found[1] > 1} == {}


def test_what_a_value_prints(values: dict[str, Any]) -> None:
    model = values["model"]
    assert f"perplexity {math.exp(model.loss):.3f}" in repr(model)
    assert repr(values["plan"]) == "<Plan: ghost, 40 mixers of mamba2, state size 16 to 8>"
    assert repr(values["plan"].kept_in("int8")).endswith("state size 16 to 8 in int8>")
    assert repr(WINDOWS) == "<Windows: 4 of 48 tokens of 'random', drawn with seed 0>"
    assert "1,000 parts" in repr(values["text"])


def test_a_plan_equals_the_one_that_is_read(values: dict[str, Any], tmp_path: Path) -> None:
    for name in ("plan", "projected"):
        plan = values[name]
        plan.save(tmp_path / name)
        read = ghostssm.Plan.read(tmp_path / name)
        assert plan == read
        scores = {mixer: score.clone() for mixer, score in plan.scores.items()}
        next(iter(scores.values()))[0, 0] += 1
        assert plan != dataclasses.replace(read, scores=scores)
        assert plan != dataclasses.replace(read, method="other")
    assert values["projected"] != values["plan"]
    assert values["plan"] != "plan"


def test_values_with_tensors_compare() -> None:
    again = random_windows(4, 48)
    assert again == WINDOWS
    assert again != random_windows(4, 48, seed=1)
    model = tiny_model()
    assert ghostssm.evaluate(model, WINDOWS) == ghostssm.evaluate(model, again)
    ids = ghostssm.Windows.from_ids([[1, 2], [3, 4]])
    assert ids == ghostssm.Windows.from_ids([[1, 2], [3, 4]])  # their bytes per token are not known: NaN


def test_what_is_the_same() -> None:
    one = torch.tensor([1.0, 2.0])
    assert same({"a": [one, math.nan]}, {"a": [one.clone(), math.nan]})
    for other in (one.double(), torch.tensor([[1.0, 2.0]]), one + 1, one.to("meta"), [1.0, 2.0], None):
        assert not same(one, other)
        assert not same(other, one)
    assert not same({"a": one}, {"b": one})
    assert not same([one], (one,))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen, "_PATIENCE", 0.0)
    monkeypatch.setattr(screen, "_REDRAWN", 0.0)


@pytest.mark.usefixtures("_impatient")
def test_long_calls_show_their_progress() -> None:
    model = tiny_model()
    for call, step in (
        (lambda: ghostssm.evaluate(model, random_windows(60, 48)), "windows 42/60, about"),
        (lambda: ghostssm.Calibration(model, WINDOWS).plan("ghost", 8), "layers 1/3, about"),
        (lambda: ghostssm.prune(model, WINDOWS, state_size=8, recipe="ghost"), "layers 1/3, about"),
    ):
        with redirect_stderr(Terminal()) as terminal:
            call()
        assert step in terminal.getvalue()
        assert terminal.getvalue().endswith("\r")
        assert terminal.getvalue().rstrip("\r").rpartition("\r")[2].strip() == ""  # the line is empty again


@pytest.mark.usefixtures("_impatient")
def test_none_silences_and_a_listener_is_told_itself() -> None:
    model, told = tiny_model(), list[str]()
    with redirect_stderr(Terminal()) as terminal:
        ghostssm.evaluate(model, WINDOWS, None)
        ghostssm.prune(model, WINDOWS, state_size=8, recipe="ghost", progress=None)
        ghostssm.evaluate(model, WINDOWS, progress=lambda what, done, total: told.append(what))
    assert terminal.getvalue() == ""
    assert set(told) == {"windows"}


@pytest.mark.usefixtures("_impatient")
def test_nothing_is_shown_where_nobody_looks() -> None:
    with redirect_stderr(io.StringIO()) as stream:
        ghostssm.evaluate(tiny_model(), WINDOWS)
    assert stream.getvalue() == ""
