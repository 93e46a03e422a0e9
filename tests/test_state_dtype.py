"""``prune --state-dtype``: what is measured, written and drawn is of a model whose state is kept in that dtype."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import ghostssm
from ghostssm.checkpoint.manifest import Manifest
from ghostssm.evaluation import speed
from ghostssm.evaluation.perplexity import evaluate
from ghostssm.evaluation.roofline import Machine
from ghostssm.ops.state_format import INT8, StateStorage
from ghostssm.plan.plan import Plan
from ghostssm.plan.provenance import Provenance
from ghostssm.plan.surgery import pruned
from ghostssm.pruning.search import smallest_plan, split
from ghostssm.workflows import report_measuring
from ghostssm.workflows.report_record import Record
from tests.conftest import Run, random_windows, tiny_model

_INT4 = StateStorage.of("int4")


def asked(model: Path, text: Path, output: Path, *more: object) -> list[object]:
    common = ["--calibration", text, "--windows", 3, "--window-length", 64, "--evaluate", text, "--text-windows", 4]
    size = ["--state-size", 8, "--method", "magnitude", "--state-dtype", "int4"]
    return ["prune", model, *size, "--output", output, *common, *more]


@pytest.mark.parametrize("road", [[], ["--stream"]])
def test_the_loss_is_that_of_the_dtype_on_both_roads(
    run: Run, small: Path, text_file: Path, tmp_path: Path, road: list[str]
) -> None:
    output = tmp_path / "out"
    code, out, err = run(*asked(small, text_file, output, *road))
    assert code == 0, err
    assert "int4" in out, "how engines are told"
    manifest, plan = Manifest.read(output), Plan.read(output, changes=False)
    assert manifest.state_dtype == plan.state_dtype == "int4"
    models = [ghostssm.load(str(place)) for place in (small, output)]
    text = ghostssm.read_text(str(text_file), "evaluation")
    windows = ghostssm.evaluation_windows(text, models[0].require_tokenizer(), 64, 4)
    dense, after = evaluate(models[0].model, windows), evaluate(models[1].model, windows, storage=_INT4)
    assert manifest.measured is not None
    assert manifest.measured.pruned_loss == pytest.approx(after.loss, abs=1e-5)
    assert manifest.measured.excess.mean == pytest.approx(after.excess_over(dense).mean, abs=1e-5)
    assert evaluate(models[1].model, windows).loss != pytest.approx(after.loss, abs=1e-4)
    card = (output / "README.md").read_text()
    assert "kept in int4**" in card
    assert "in float32, the state in int4; nats" in card
    _, out, _ = run("evaluate", output, "--text", text_file, "--window-length", 64, "--text-windows", 4, "--json")
    assert json.loads(out)["loss"] == pytest.approx(after.loss, abs=1e-5)


def test_pages_show_what_was_measured_in_their_dtype(
    run: Run, small: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("altair", reason="figures need altair and vl-convert-python")
    from ghostssm.report.building import checkpoint_report

    timed: dict[str, StateStorage] = {}

    def measure(*arguments: Any, storages: dict[str, StateStorage], **options: Any) -> Any:
        timed.update(storages)
        return speed.measure(*arguments, storages=storages, **options)

    monkeypatch.setattr(report_measuring, "measure", measure)
    output = tmp_path / "out"
    code, _, err = run(*asked(small, text_file, output, "--report", "--batch", 1))
    assert code == 0, err
    assert {name: storage.format.name for name, storage in timed.items()} == {"dense": "float32", "pruned": "int4"}
    report = checkpoint_report(output)
    assert [figure.name for figure in report.figures][:3] == ["windows", "decode", "capacity"]
    assert report.subtitle.endswith("state in int4")
    cards = {card.label: card for card in report.cards}
    assert cards["Excess loss"].note.endswith("state in int4")
    assert cards["Decoding"].note.endswith("state in int4")
    rows = 3 * 64
    assert cards["State per sequence"].value == f"{rows * 16 * 4 / 1024:.1f} KiB → {rows * (8 // 2 + 4) / 1024:.1f} KiB"
    assert {row["model"] for row in report.figures[1].tables["rows"]} == {"dense", "pruned, state in int4"}
    assert report.missing == []

    page = tmp_path / "page.html"
    code, _, err = run("report", output, "--state-dtype", "bfloat16", "--output", page)
    assert code == 0, err
    other = checkpoint_report(output, "bfloat16")
    assert not {"windows", "decode"} & {figure.name for figure in other.figures}
    assert {card.label for card in other.cards} == {"State size", "State per sequence"}
    assert all("--state-dtype bfloat16" in command for _, command in other.missing)
    assert len(other.missing) == 2
    assert "How the models go on" not in page.read_text()
    assert "state in bfloat16" in page.read_text()


def test_a_record_of_the_folder_that_is_broken_is_refused(
    run: Run, small: Path, text_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    run(*asked(small, text_file, output))
    assert Record.read(output, list(Plan.read(output, changes=False).selections), (1, 16)).state_dtype == "int4"
    record = json.loads((output / "report.json").read_text())
    (output / "report.json").write_text(json.dumps(record | {"state_dtype": "int3"}))
    code, _, err = run("report", output)
    assert code == 2
    assert "is not a record that ghostssm wrote" in " ".join(err.split())


def test_the_smallest_state_is_searched_in_the_dtype() -> None:
    model, windows = tiny_model(), random_windows(8, 40)
    _, held_out = split(windows)
    plan = smallest_plan(model, windows, "magnitude", 10.0, multiple=4, dtypes=["int4"])
    assert plan.provenance is not None
    assert plan.provenance.search is not None
    dense = evaluate(model, held_out)
    with pruned(model, plan) as smaller:
        expected = evaluate(smaller, held_out, storage=_INT4).excess_over(dense).mean
    assert plan.provenance.search.excess.mean == pytest.approx(expected, abs=1e-6)


def test_a_comparison_refits_for_int4_apart() -> None:
    options: dict[str, Any] = {"evaluate": random_windows(2, 40, seed=1), "batches": (), "state_sizes": [8]}
    dtypes = ["float32", "int8", "int4"]
    recipe = "magnitude+refit2"
    found = ghostssm.compare(tiny_model(), random_windows(4, 40), methods=recipe, state_dtypes=dtypes, **options)
    rows = {(row.method, row.state_dtype) for row in found.rows if row.method.startswith(recipe)}
    assert rows == {(recipe, "float32"), (recipe, "int8"), (f"{recipe} trained in int4", "int4")}


def test_bandwidth_predicts_the_speed_of_a_narrow_state(small: Path) -> None:
    described, machine = ghostssm.describe(str(small)), Machine(1e6, {64: 1e15})
    rows, batch = 3 * 64, 64
    state = rows * (16 + 4)
    seconds = (4 * described.parameters + 2 * batch * state) / 1e6
    assert report_measuring.predicted_speed(described, machine, batch, None, INT8) == pytest.approx(batch / seconds)


def test_foreign_dtypes_in_a_plan_are_none(run: Run, small: Path, text_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    run(*asked(small, text_file, output))
    options = json.loads((output / "plan.json").read_text())["provenance"]
    found = Provenance.from_json(options)
    assert found is not None
    assert found.as_json() == options
    for foreign in ("int3", 4, None, ["int8"]):
        found = Provenance.from_json(options | {"asked_state_dtype": foreign})
        assert found is not None
        assert found.state_dtype is None


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--state-dtype", "int3"], "expected one of: float32"),
        (["--state-dtype", "int8", "--engine", "vllm"], "vllm keeps a state in float32 or bfloat16 or float16"),
    ],
)
def test_dtypes_that_can_not_be_are_refused(
    run: Run, small: Path, text_file: Path, tmp_path: Path, given: list[str], told: str
) -> None:
    code, _, err = run(*asked(small, text_file, tmp_path / "out", *given))
    assert code == 2
    assert told in " ".join(err.split())


def test_bytes_choose_the_dtype_themselves(run: Run, small: Path, text_file: Path, tmp_path: Path) -> None:
    common = ["--calibration", text_file, "--output", tmp_path / "out"]
    code, _, err = run("prune", small, "--state-bytes", "1/4", "--state-dtype", "int8", *common)
    assert code == 2
    assert "--state-dtype has no effect with --state-bytes" in " ".join(err.split())
