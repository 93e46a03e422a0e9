"""The search for the smallest state within a bound."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from ghostssm.errors import InputError, NumericalError
from ghostssm.evaluation import evaluate
from ghostssm.ops.state_format import StateFormat
from ghostssm.plan.measurement import Difference, Searched
from ghostssm.plan.plan import Plan
from ghostssm.plan.surgery import pruned
from ghostssm.pruning import search
from ghostssm.pruning.run import Calibration
from ghostssm.pruning.search import smallest_plan
from tests.conftest import random_windows, tiny_model


def search_of(plan: Plan) -> Searched:
    assert plan.provenance is not None
    assert plan.provenance.search is not None
    return plan.provenance.search


@dataclass(frozen=True)
class MadeUp:
    """A loss that falls by 1 with every channel of the state, from 16."""

    loss: float

    def excess_over(self, dense: MadeUp) -> Difference:
        return Difference(self.loss - dense.loss, 0.0)


@pytest.fixture
def _losses_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    def made_up(model: Any, windows: object, progress: object, state_dtype: str = "float32") -> MadeUp:
        return MadeUp(16.0 - model.config.state_size)

    monkeypatch.setattr(search, "evaluate_in_float32", made_up)


@pytest.mark.usefixtures("_losses_by_size")
@pytest.mark.parametrize(
    ("multiple", "state_sizes"), [(1, None), (2, None), (3, None), (5, None), (8, None), (1, (1, 2, 7, 11)), (1, (9,))]
)
def test_the_smallest_size_within_every_bound_is_found(multiple: int, state_sizes: Sequence[int] | None) -> None:
    """Also where the bound is met exactly, and none where no size meets it."""
    model, windows = tiny_model(num_hidden_layers=1), random_windows(4, 10)
    sizes = range(multiple, 16, multiple) if state_sizes is None else state_sizes
    options: dict[str, Any] = {"dtypes": ["float32"], "multiple": multiple, "state_sizes": state_sizes}
    for bound in torch.arange(0, 17, 0.5).tolist():
        enough = [size for size in sizes if 16 - size <= bound]
        if enough:
            plan = smallest_plan(model, windows, "magnitude", bound, **options)
            assert plan.kept_state_size == enough[0]
            assert search_of(plan).max_excess_loss == bound
        else:
            with pytest.raises(InputError, match="allow more"):
                smallest_plan(model, windows, "magnitude", bound, **options)
    assert model.config.state_size == 16


@pytest.mark.parametrize("dtypes", [None, ["float32", "int4"], ["bfloat16", "int8", "fp8"], ["int8"]])
def test_the_fewest_bytes_within_every_bound_are_found(
    monkeypatch: pytest.MonkeyPatch, dtypes: list[str] | None
) -> None:
    """Over size and dtype, as trying all of them does; no pair of the two is measured that takes more than the best."""
    lost = {"float32": 0.0, "bfloat16": 0.5, "float16": 0.25, "int8": 2.0, "fp8": 3.0, "int4": 6.0}

    def made_up(model: Any, windows: object, progress: object, state_dtype: str = "float32") -> MadeUp:
        return MadeUp(16.0 - model.config.state_size + lost[state_dtype])

    monkeypatch.setattr(search, "evaluate_in_float32", made_up)
    model, windows = tiny_model(num_hidden_layers=1), random_windows(4, 10)
    every = [
        (StateFormat.of(name).state_bytes(1, size), 16 - size + lost[name])
        for name in dtypes or lost
        for size in (4, 8, 12, 16)
        if (name, size) != ("float32", 16)
    ]
    for bound in range(17):
        within = [taken for taken, loss in every if loss <= bound]
        if not within:
            with pytest.raises(InputError, match="allow more"):
                smallest_plan(model, windows, "magnitude", bound, dtypes=dtypes, multiple=4)
            continue
        plan = smallest_plan(model, windows, "magnitude", bound, dtypes=dtypes, multiple=4)
        assert plan.state_dtype == search_of(plan).state_dtype
        assert StateFormat.of(plan.state_dtype).state_bytes(1, plan.kept_state_size) == min(within)
        assert search_of(plan).excess.mean == 16 - plan.kept_state_size + lost[plan.state_dtype]


def test_the_bound_holds_on_windows_that_calibrated_nothing() -> None:
    model, windows = tiny_model(), random_windows(8, 60)
    apart = torch.arange(8) % 4 == 1
    calibration, held_out = Calibration(model, windows.part(~apart)), windows.part(apart)
    dense = evaluate(model, held_out)

    def excess(size: int) -> float:
        with pruned(model, calibration.plan("ghost", size)) as smaller:
            return evaluate(smaller, held_out).excess_over(dense).mean

    bound = excess(8) + 1e-6
    plan = smallest_plan(model, windows, "ghost", bound, dtypes=["float32"], multiple=4)
    size = plan.kept_state_size
    assert size % 4 == 0
    assert excess(size) <= bound
    searched = search_of(plan)
    assert (searched.max_excess_loss, searched.windows) == (bound, 2)
    assert searched.excess.mean == pytest.approx(excess(size), abs=1e-6)


def test_a_search_without_a_standard_error() -> None:
    plan = smallest_plan(tiny_model(), random_windows(4, 60), "random", 100.0)
    assert search_of(plan).as_json()["standard_error"] is None
    searched = search_of(plan)
    assert "±" not in searched.text


HUGE = {"max_excess_loss": 10**400, "held_out_windows": 1, "state_dtype": "int8", "excess_loss": 1, "standard_error": 1}
"""The bound is a number that no float holds."""


@pytest.mark.parametrize("foreign", [{}, {"search": None}, {"search": {"standard_error": None}}, {"search": "x"}, HUGE])
def test_a_provenance_without_a_search(foreign: dict[str, Any]) -> None:
    assert Searched.from_json(foreign) is None


def test_a_size_whose_loss_overflows_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(model: Any, windows: Any, progress: Any = None, state_dtype: str = "float32") -> Any:
        if model.config.state_size < 12:
            raise NumericalError("overflow")
        return evaluate(model, windows)

    monkeypatch.setattr(search, "evaluate_in_float32", measured)
    plan = smallest_plan(tiny_model(), random_windows(8, 60), "ghost", 10.0, dtypes=["float32"], multiple=4)
    assert plan.kept_state_size == 12


def test_too_tight_a_bound_is_refused() -> None:
    with pytest.raises(InputError, match="allow more"):
        smallest_plan(tiny_model(), random_windows(8, 60), "random", -10.0)


def test_a_method_that_leaves_the_state_whole_is_refused() -> None:
    with pytest.raises(InputError, match="leaves the state whole"):
        smallest_plan(tiny_model(), random_windows(8, 60), "sparsegpt", 1.0)


def test_too_few_windows_are_refused() -> None:
    with pytest.raises(InputError, match="at least 4"):
        smallest_plan(tiny_model(), random_windows(3, 60), "ghost", 1.0)


def test_progress_names_what_is_tried_and_how_many_may_be_left() -> None:
    """Every size and dtype once or twice, as one is planned before it is measured; the bound holds, and reaches 0."""
    told: list[tuple[str, str, int]] = []

    def progress(what: str, done: int, total: int) -> None:
        if found := re.match(r"ghost, N' = (\d+) in (\w+), at most (\d+) more: (?:layers|windows)$", what):
            told.append((found[1], found[2], int(found[3])))
        else:
            assert what == "unpruned model: windows"

    plan = smallest_plan(tiny_model(), random_windows(8, 60), "ghost", 1e-3, multiple=2, progress=progress)
    tried = list(dict.fromkeys(told))
    assert len({each[:2] for each in tried}) == len(tried) > 3
    assert all(left >= len(tried) - number for number, (_, _, left) in enumerate(tried, 1))
    assert tried[-1][2] == 0
    assert (str(plan.kept_state_size), search_of(plan).state_dtype) in [each[:2] for each in tried]
