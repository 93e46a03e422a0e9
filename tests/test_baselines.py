"""Baselines beside a pruned model: ``prune --baselines`` measures what each recipe gives when it is run alone."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import ghostssm
from ghostssm.errors import NumericalError
from ghostssm.plan.measurement import Compared, Difference, Measurement
from ghostssm.workflows import prune_plans
from tests.conftest import Run, random_windows, tiny_model
from tests.families.tiny import tiny_hybrid

TEXT, OTHER = random_windows(8, 40), random_windows(6, 40, seed=1)


def pruned(recipe: str = "output+repair", **options: Any) -> Measurement:
    measured = ghostssm.prune(tiny_model(), TEXT, recipe=recipe, evaluate=OTHER, **options).measured
    assert measured is not None
    return measured


@pytest.mark.parametrize(
    "target",
    [
        {"state_size": 8},
        {"state_size": 8, "state_dtype": "int8"},
        {"state_bytes": "1/4", "multiple": 4},
        {"state_bytes": "1/4", "multiple": 4, "engines": ["vllm"]},
    ],
    ids=str,
)
def test_a_baseline_loses_what_it_loses_alone(target: dict[str, Any]) -> None:
    recipes = ["ghost", "magnitude", *([] if "engines" in target else ["balanced"])]
    beside = pruned(**target, baselines=[*recipes, "output+repair"])
    assert replace(beside, compared=()) == pruned(**target)
    assert [each.recipe for each in beside.compared] == ["output+repair", *recipes]
    for each in beside.compared:
        alone = ghostssm.prune(tiny_model(), TEXT, recipe=each.recipe, evaluate=OTHER, **target)
        assert alone.measured is not None
        assert each.excess.mean == pytest.approx(alone.measured.excess.mean, abs=1e-6)
        assert each.excess.standard_error == pytest.approx(alone.measured.excess.standard_error, abs=1e-6)
        assert each.state_size == alone.plan.mean_state_size
        assert each.state_dtype == (alone.plan.state_dtype or "float32")
        assert each.own_class == alone.plan.needs_own_class


@pytest.mark.parametrize("case", ["nemotron_h", "falcon_h1"])
def test_hybrids_have_baselines_too(case: str) -> None:
    def measured(recipe: str, *baselines: str) -> Measurement:
        options: dict[str, Any] = {"recipe": recipe, "state_bytes": "1/4", "multiple": 2, "baselines": baselines}
        found = ghostssm.prune(tiny_hybrid(case), TEXT, evaluate=OTHER, **options).measured
        assert found is not None
        return found

    for each in measured("magnitude", "ghost", "balanced").compared:
        assert each.excess.mean == pytest.approx(measured(each.recipe).excess.mean, abs=1e-6)


def test_where_the_loss_is_bounded_a_baseline_gets_the_bytes_that_were_found() -> None:
    own, *others = pruned(max_excess_loss=0.5, multiple=4, baselines=["random", "balanced"]).compared
    assert own.state_bytes < 3 * 64 * 16 * 4
    for each in others:
        assert each.state_bytes <= own.state_bytes
        same = pruned(each.recipe, state_bytes=f"{own.state_bytes}B", multiple=4)
        assert each.excess.mean == pytest.approx(same.excess.mean, abs=1e-6)


def test_a_model_is_pruned_as_if_no_baseline_stood_beside_it() -> None:
    outcomes = [
        ghostssm.prune(tiny_model(), TEXT, state_size=8, recipe="ghost", evaluate=OTHER, baselines=baselines)
        for baselines in ((), ("balanced+per-layer", "random"))
    ]
    first, second = (outcome.checkpoint.model.state_dict() for outcome in outcomes if outcome.checkpoint)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_baseline_that_can_not_be_made_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    real = prune_plans.pruned

    def failing(model: Any, plan: Any) -> Any:
        if plan.method == "random":
            raise NumericalError("layer 1 overflows")
        return real(model, plan)

    monkeypatch.setattr(prune_plans, "pruned", failing)
    measured = pruned(state_size=8, baselines=["random", "ghost"], notify=told.append)
    assert [each.recipe for each in measured.compared] == ["output+repair", "ghost"]
    assert "random is left out of the baselines: layer 1 overflows" in told


def test_the_command_shows_and_records_them(run: Run, small: Path, text_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    texts = ["--calibration", text_file, "--windows", 4, "--window-length", 64, "--evaluate", text_file]
    common = ["--state-size", 8, "--method", "output+repair", "--output", output, "--overwrite", *texts]
    code, out, err = run("prune", small, *common, "--baselines", "ghost", "random", "--json")
    assert code == 0, err
    measured = json.loads(out)["measured"]
    assert [each["recipe"] for each in measured["compared"]] == ["output+repair", "ghost", "random"]
    manifest = json.loads((output / "ghostssm.json").read_text())
    assert manifest["measured"] == measured
    assert manifest["request"]["baselines"] == ["ghost", "random"]
    code, out, _ = run("prune", small, *common, "--baselines", "ghost", "random")
    assert "What baselines lose on text.txt; output+repair was written:" in out
    read = Measurement.from_json(measured)
    assert read is not None
    rows = read.cells()[1]
    assert [row[0] for row in rows] == [
        each.recipe for each in sorted(read.compared, key=lambda each: each.excess.mean)
    ]
    card = (output / "README.md").read_text()
    for row in rows:
        assert f"| {' | '.join(row)} |" in card
        assert all(cell in out for cell in row)
    assert run("verify", output)[0] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--baselines ghost", "--baselines works with --evaluate only"),
        ("--evaluate a.txt --baselines ghots", "No method is called 'ghots'"),
        ("--evaluate a.txt --baselines ghost --stream", "--baselines prunes the whole model several times"),
        ("--evaluate a.txt --baselines balanced --engine vllm", "vllm"),
    ],
)
def test_what_can_not_stand_beside(run: Run, small: Path, tmp_path: Path, options: str, message: str) -> None:
    (tmp_path / "a.txt").write_text("text")
    place = options.replace("a.txt", str(tmp_path / "a.txt")).split()
    code, _, err = run("prune", small, "--state-size", 8, "--output", tmp_path / "o", *place)
    assert code == 2
    assert message in " ".join(err.split())
    assert not (tmp_path / "o").exists()


def test_an_overflowing_baseline_survives_json() -> None:
    entry = Compared("random", True, 7.5, "int8", 640, Difference(math.inf, math.nan))
    measured = Measurement("a", 2, 64, 2.0, 2.5, Difference(0.5, 0.25), (entry,))
    read = Measurement.from_json(json.loads(json.dumps(measured.as_json())))
    assert repr(read) == repr(measured)  # NaN equals nothing
    assert Measurement.from_json(measured.as_json() | {"compared": [{}]}) is None
