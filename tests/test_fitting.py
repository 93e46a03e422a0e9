"""Size and dtype chosen together for a bound on the bytes of state per sequence."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import ghostssm
from ghostssm.errors import InputError
from ghostssm.evaluation import evaluate
from ghostssm.ops.state_format import FORMATS, StateStorage
from ghostssm.plan.choice import Choice
from ghostssm.plan.plan import Plan
from ghostssm.plan.surgery import apply_plan, pruned
from ghostssm.pruning.recipe import Recipe
from ghostssm.pruning.run import Calibration
from ghostssm.pruning.search import Fitting, widest_fit
from ghostssm.text.windows import Windows
from ghostssm.workflows.compare_result import comparison_cells
from tests.conftest import Run, random_windows, tiny_model
from tests.families.tiny import tiny_hybrid

DENSE = 3 * 64 * 16 * 4
"""Bytes of the tiny model's state: layers, heads x head_dim, N, float32."""


def plan_for_bytes(model: PreTrainedModel, windows: Windows, recipe: str, state_bytes: int, **options: Any) -> Plan:
    return Fitting.of(model, windows).plan(Recipe.parse(recipe), state_bytes, **options)


def choice_of(plan: Plan) -> Choice:
    assert plan.provenance is not None
    assert plan.provenance.choice is not None
    return plan.provenance.choice


@pytest.mark.parametrize("row_bytes", [3.9, 4, 8.5, 12, 31, 64, 68, 500])
def test_the_widest_fit_is_the_last_whose_numbers_and_scale_fit(row_bytes: float) -> None:
    bits = {"float32": 32, "bfloat16": 16, "float16": 16, "int8": 8, "fp8": 8, "int4": 4}
    found = widest_fit(row_bytes, range(1, 129))
    for name, width in bits.items():
        room = row_bytes - (4 if width < 16 else 0)
        fitting = [size for size in range(1, 129) if -(-size * width // 8) <= room]
        assert found.get(name) == (fitting[-1] if fitting else None)
    assert set(widest_fit(64, [4, 8, 16], ["int8", "float32"]).items()) == {("float32", 16), ("int8", 16)}


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_what_is_trained_is_trained_for_its_dtype(dtype: str) -> None:
    plan = plan_for_bytes(tiny_model(), random_windows(8, 40), "random+distill1", DENSE // 4, dtypes=(dtype,))
    assert plan.state_dtype == choice_of(plan).chosen.state_dtype == dtype
    assert plan.distillations[-1].state_dtype == {"int8": "float32", "int4": "int4"}[dtype]


@pytest.mark.parametrize("recipe", ["output+repair", "balanced"])
def test_progress_names_every_candidate_and_how_many_are_left(recipe: str) -> None:
    told: list[str] = []
    windows = random_windows(8, 40)
    fitting = Fitting.of(tiny_model(), windows, lambda what, done, total: told.append(what))
    assert set(told) == {"unpruned model: windows"}
    told.clear()
    bound = {"state_bytes": DENSE // 4, "multiple": 4}
    plan = fitting.plan(Recipe.parse(recipe), **bound, progress=lambda what, done, total: told.append(what))
    measured = dict.fromkeys(what for what in told if what.endswith(": windows"))
    candidates = {(each.state_size, each.state_dtype) for each in choice_of(plan).candidates}
    for left, what in enumerate(reversed(measured)):
        named = re.fullmatch(rf"{re.escape(recipe)}, N' = (\d+) in (\w+), {left} more: windows", what)
        assert named is not None, what
        candidates.remove((int(named[1]), named[2]))
    assert not candidates


@pytest.mark.parametrize("recipe", ["output+repair", "balanced+per-layer"])
def test_what_loses_least_on_held_out_windows_is_chosen(recipe: str) -> None:
    model, windows = tiny_model(), random_windows(8, 40)
    plan = plan_for_bytes(model, windows, recipe, DENSE // 4, multiple=4)
    choice = choice_of(plan)
    sizes = {each.state_dtype: each.state_size for each in choice.candidates if each.state_dtype != "tiers"}
    assert (len(choice.candidates) > len(sizes)) == recipe.startswith("balanced")
    assert sizes == {"float32": 4, "bfloat16": 8, "float16": 8, "int8": 12, "fp8": 12, "int4": 16}
    assert all(each.state_bytes <= choice.state_bytes == DENSE // 4 for each in choice.candidates)
    assert plan.mean_state_size == choice.chosen.state_size

    apart = torch.arange(8) % 4 == 1
    calibration, held_out = Calibration(model, windows.part(~apart)), windows.part(apart)
    dense = evaluate(model, held_out)
    excess = {}
    for dtype, size in sizes.items():
        with pruned(model, calibration.plan(recipe, int(size), multiple=4)) as smaller:
            found = evaluate(smaller, held_out, storage=StateStorage.of(dtype))
            excess[dtype] = found.excess_over(dense).mean
    measured = {each.state_dtype: each.excess.mean for each in choice.candidates}
    assert {dtype: measured[dtype] for dtype in sizes} == pytest.approx(excess, abs=1e-6)
    assert choice.chosen.state_dtype == plan.state_dtype == min(measured, key=lambda dtype: measured[dtype])


def test_the_record_survives_json() -> None:
    choice = choice_of(plan_for_bytes(tiny_model(), random_windows(4, 40), "magnitude", DENSE // 2))
    found = Choice.from_json(json.loads(json.dumps(choice.as_json())))
    assert repr(found) == repr(choice)  # NaN, for one window, equals nothing


@pytest.mark.parametrize("foreign", [None, {}, {"candidates": []}, {"candidates": [{}]}, {"candidates": 3}, "x"])
def test_a_foreign_record_is_none(foreign: Any) -> None:
    assert Choice.from_json(foreign) is None


def test_a_state_that_fits_in_no_dtype_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"No state fits into 10 bytes .* 8 channels in int4, takes .* smaller --multiple"
    ):
        plan_for_bytes(tiny_model(), random_windows(4, 40), "ghost", 10)


def test_the_command_records_the_dtype_where_it_is_read(run: Run, small: Path, text_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    common = ["--calibration", text_file, "--windows", 8, "--window-length", 64, "--output", output, "--overwrite"]
    options = ["--state-bytes", "1/4", "--multiple", 4, "--method", "magnitude", "--evaluate", text_file]
    code, out, err = run("prune", small, *options, *common, "--json")
    assert code == 0
    assert "2 of these windows are held out" in err
    choice = json.loads(out)["choice"]
    dtype = choice["candidates"][0]["state_dtype"]
    assert json.loads((output / "ghostssm.json").read_text())["options"]["choice"] == choice
    pruning = ghostssm.describe(str(output)).pruning
    assert pruning is not None
    assert pruning.state_dtype == dtype
    told = run("prune", small, *options, *common)[1]
    assert f"the same in {dtype}" in told
    assert f'ghostssm.accelerate(model, state_dtype="{dtype}")' in told
    card = (output / "README.md").read_text()
    assert f"kept in {dtype}**" in card
    assert (f'`ghostssm.accelerate(model, state_dtype="{dtype}")`' in card) == (dtype != "float32")
    assert all(f"| {name} |" in card for name in FORMATS)

    measure = ["evaluate", output, "--text", text_file, "--window-length", 64, "--json"]
    losses = {name: json.loads(run(*measure, *given)[1])["loss"] for name, given in _dtypes(dtype).items()}
    assert losses["default"] == losses[dtype]
    assert losses["default"] == pytest.approx(json.loads(out)["measured"]["pruned_loss"], abs=1e-5)
    code, _, _ = run("generate", output, "--prompt", "a b", "--max-new-tokens", 2)
    assert code == 0
    code, out, _ = run("prune", small, *options, *common)
    assert f"in {dtype}, " in out
    assert "excess loss" in out


def _dtypes(chosen: str) -> dict[str, list[str]]:
    return {"default": [], chosen: ["--state-dtype", chosen]}


def test_engines_choose_among_what_they_store(
    run: Run, folder_of: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    model = folder_of(state_size=64, num_hidden_layers=1)
    common = ["--calibration", text_file, "--windows", 4, "--window-length", 64, "--output", tmp_path / "out"]
    options = ["--state-bytes", "1/2", "--method", "magnitude", "--engine", "vllm", "--untie", "--json"]
    code, out, err = run("prune", model, *options, *common)
    assert code == 0, err
    found = {each["state_dtype"]: each["state_size"] for each in json.loads(out)["choice"]["candidates"]}
    assert found == {"float32": 32, "bfloat16": 64, "float16": 64}


def test_the_config_tells_engines_that_look_there(tmp_path: Path) -> None:
    """vLLM and SGLang, of Nemotron-H; each in a key of its own."""
    model = tiny_hybrid("nemotron_h")
    vocabulary = model.config.vocab_size
    plan = plan_for_bytes(model, random_windows(4, 40, vocabulary), "magnitude", 10**9, dtypes=["bfloat16"], multiple=2)
    folder = ghostssm.save(apply_plan(model, plan), plan, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    assert config["mamba_ssm_cache_dtype"] == config["mamba_ssm_dtype"] == "bfloat16"
    assert ghostssm.load(str(folder)).model.config.mamba_ssm_cache_dtype == "bfloat16"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--state-bytes", "0"], "above 0 and below 1"),
        (["--state-bytes", "1/0"], "above 0 and below 1"),
        (["--state-bytes", "1"], "above 0 and below 1"),
        (["--state-bytes", "6GiB"], "less than the"),
        (["--state-bytes", "6xB"], "such as"),
        (["--state-bytes", "half"], "such as 1/8"),
        (["--state-bytes", "1/4", "--budget", "0.5"], "give one of them"),
        (["--state-bytes", "1/4", "--stream"], "--stream"),
        (["--state-bytes", "1/4", "--method", "sparsegpt"], "leaves the state whole"),
    ],
)
def test_bounds_that_say_nothing_are_refused(
    run: Run, small: Path, text_file: Path, tmp_path: Path, given: list[str], told: str
) -> None:
    common = ["--calibration", text_file, "--windows", 8, "--window-length", 64, "--output", tmp_path / "out"]
    code, _, err = run("prune", small, *given, *common)
    assert code == 2
    assert told in err


@pytest.mark.parametrize("recipe", ["magnitude", "balanced+per-layer"])
def test_a_comparison_has_what_prune_chooses_within_each_bound(recipe: str) -> None:
    model, calibration, text = tiny_model(), random_windows(8, 40), random_windows(4, 40, seed=1)
    bounds = {"1/2": DENSE // 2, "1/4": DENSE // 4}
    found = ghostssm.compare(
        model, calibration, methods=[recipe, "ghost"], evaluate=text, state_bytes=list(bounds), batches=[1]
    )
    rows = {bound: row for row in found.rows if row.method.startswith(recipe) for bound in row.within}
    dense = evaluate(model, text)
    for bound, state_bytes in bounds.items():
        plan, row = plan_for_bytes(model, calibration, recipe, state_bytes), rows[bound]
        chosen = choice_of(plan).chosen
        assert (row.stored_state_size, row.state_dtype) == (chosen.state_size, chosen.state_dtype)
        assert row.state_bytes == pytest.approx(chosen.state_bytes, abs=1)
        with pruned(model, plan) as smaller:
            expected = evaluate(smaller, text, storage=StateStorage.of(chosen.state_dtype)).excess_over(dense)
        assert (row.excess, row.standard_error) == pytest.approx((expected.mean, expected.standard_error), abs=1e-6)
        assert row.tokens_per_second[1] > 0
    headers, lines = comparison_cells(found.rows)
    assert headers[:4] == ["method", "within", "N'", "dtype"]
    assert [line[:2] for line in lines if line[0] == "dense"] == [["dense", ""]]


def test_a_comparison_for_engines_chooses_among_what_they_run(
    run: Run, folder_of: Callable[..., Path], text_file: Path
) -> None:
    model = folder_of(state_size=64, num_hidden_layers=1)
    common = ["--calibration", text_file, "--text", text_file, "--windows", 4, "--window-length", 64]
    options = ["--state-bytes", "1/2", "--engine", "vllm", "--text-windows", 2, "--batch", 1, "--json"]
    code, out, err = run("compare", model, *common, *options)
    assert code == 0, err
    rows = json.loads(out)[1:]  # the first is the dense model's
    assert {row["state_dtype"] for row in rows} <= {"float32", "bfloat16", "float16"}
    assert {row["state_size"] for row in rows} <= {32, 64}
    stock = {row["method"] for row in rows}
    assert "ghost" in stock
    assert not {"balanced", "taylor"} & stock  # vLLM has no class for the one; the other's size is not known before


def test_bounds_within_which_the_same_is_chosen_share_a_row() -> None:
    bounds = ["1/2", "0.501"]
    options: dict[str, Any] = {"evaluate": random_windows(2, 40, seed=1), "batches": ()}
    found = ghostssm.compare(tiny_model(), random_windows(4, 40), methods="magnitude", state_bytes=bounds, **options)
    assert [row.within for row in found.rows] == [(), tuple(bounds)]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([], "give --state-size or --state-bytes"),
        (["--state-bytes", "1/4", "--state-size", "4"], "--state-size has no effect with --state-bytes"),
        (["--state-bytes", "1/4", "--state-dtype", "int8"], "--state-dtype has no effect with --state-bytes"),
        (["--state-bytes", "1/4,1/8"], "separated by spaces: --state-bytes 1/4 1/8"),
        (["--state-bytes", "1/4", "half"], "such as 1/8"),
        (["--state-bytes", "1/1000"], "No state fits into 12 bytes"),
        (["--state-bytes", "1/4", "--methods", "sparsegpt"], "leaves the state whole"),
        (["--state-bytes", "1/4", "--windows", "3"], "at least 4"),
        (["--state-size", "4", "--engine", "vllm"], "--engine works with --state-bytes only"),
        (["--state-bytes", "1/4", "--engine", "vllm", "--methods", "balanced"], "leave the engine out"),
    ],
)
def test_comparisons_that_say_nothing_are_refused(
    run: Run, small: Path, text_file: Path, given: list[str], told: str
) -> None:
    common = ["--calibration", text_file, "--text", text_file, "--window-length", 64]
    code, _, err = run("compare", small, *common, *given)
    assert code == 2
    assert told in " ".join(err.split())
