"""What a report measures, reads and writes."""

from __future__ import annotations

import base64
import dataclasses
import gzip
import json
import math
import re
import shlex
import shutil
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from transformers import Mamba2ForCausalLM, PreTrainedTokenizerFast

import ghostssm
from ghostssm.checkpoint.description import describe
from ghostssm.checkpoint.manifest import RECORD_FILE, Manifest
from ghostssm.cli.main import app
from ghostssm.errors import InputError
from ghostssm.models.families import mixers_of
from ghostssm.plan.decision import Decision, Selection
from ghostssm.plan.measurement import Difference
from ghostssm.plan.plan import Plan
from ghostssm.pruning.run import Calibration
from ghostssm.report.building import checkpoint_report, comparison_report
from ghostssm.report.figures import MOST_CHANNELS
from ghostssm.report.figures.cost import size_figure
from ghostssm.report.figures.state import correlation, hankel_figure, phantom_figure, quadrants, saliency_figure
from ghostssm.report.figures.training import distillation_figure
from ghostssm.report.page import Report, Section, Table, Texts, html_page
from ghostssm.report.telling import command, prune_command, repeating_command
from ghostssm.workflows.compare_result import Row
from ghostssm.workflows.report_measuring import observe
from ghostssm.workflows.report_record import Observations, Record
from ghostssm.workflows.requests import DistillRequest, PruneRequest
from tests.conftest import random_windows, tiny_model

_LIMIT = 2_000_000
_HOSTILE = "<script>alert('x')</script>&\"${x}"


def data_of(page: Path | str) -> Any:
    """The figures that a page carries."""
    text = page.read_text() if isinstance(page, Path) else page
    packed = re.search(r'<script id="data" type="text/plain">([^<]*)</script>', text)
    assert packed is not None
    return json.loads(gzip.decompress(base64.b64decode(packed[1])))


def test_observations_are_of_the_unpruned_model() -> None:
    model, windows = tiny_model(n_groups=2), random_windows(3, 40)
    seen = observe(model, windows)
    plan = Calibration(model, windows).plan("ghost", 16)  # nothing is removed on the way
    for mixer in mixers_of(model):
        torch.testing.assert_close(seen.energies[mixer.name], plan.scores[mixer.name])
        weight = mixer.in_proj.weight.detach().double().numpy()
        rows = np.linalg.norm(weight, axis=1)
        paired = rows[mixer.layout.in_proj_B] * rows[mixer.layout.in_proj_C]
        np.testing.assert_allclose(seen.weight_norms[mixer.name].flatten(), paired, rtol=1e-5)
        values = seen.hankel[mixer.name]
        assert (values[:, 1:] <= values[:, :-1]).all()
    assert seen.tokens == 120


def test_quadrants_and_correlation() -> None:
    norm = torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=torch.float64)
    energy = torch.tensor([[9.0, 1.0, 0.5, 8.0]], dtype=torch.float64)
    assert quadrants(norm, energy).tolist() == [[0, 2, 1, 3]]
    drawn = torch.rand(2, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = np.corrcoef(*drawn.log().numpy())[0, 1]
    assert correlation(drawn[0], drawn[1]) == pytest.approx(expected)


def test_pages_hold_every_figure_and_fetch_nothing(pages: dict[str, Path]) -> None:
    expected = {
        "prune": ["windows", "baselines", "decode", "capacity", "phantom", "hankel", "saliency"],
        "compare": ["sizes", "windows", "speeds", "decode", "capacity", "phantom", "hankel", "saliency"],
        "distill": ["distillation", "capacity", "saliency"],
    }
    for name, figures in expected.items():
        text = pages[name].read_text()
        assert [figure["name"] for figure in data_of(text)] == figures
        assert pages[name].stat().st_size < _LIMIT
        assert "default-src 'none'" in text
        markup = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
        headings = re.findall("<h2>(.*?)</h2>", markup)
        assert headings == ["What it cost", "What it bought", "What the state does", "Where it comes from"]
        assert not re.search(r'(?:src|href)="(?!data:)|url\(|@import', markup)


def test_the_page_has_what_the_plan_and_the_manifest_have(pages: dict[str, Path]) -> None:
    folder = pages["folder"]
    plan = Plan.read(folder)
    tables = {figure["name"]: figure["tables"] for figure in data_of(pages["prune"])}
    rows = tables["saliency"]["channels"]
    kept = [
        (layer, group, channel)
        for layer, selection in enumerate(plan.selections.values())
        for group, channels in enumerate(selection.kept)
        for channel in channels
    ]
    drawn = zip(rows["layer"], rows["group"], rows["channel"], rows["kept"], strict=True)
    assert [place[:3] for place in drawn if place[3] == "kept"] == kept
    measured = json.loads((folder / "ghostssm.json").read_text())["measured"]
    assert np.mean(tables["windows"]["windows"]["excess"]) == pytest.approx(measured["excess_loss"], rel=1e-2)
    text = pages["prune"].read_text()
    assert f"{measured['excess_loss']:.4f} ± {measured['standard_error']:.4f}" in text
    assert "75% less" in text
    speeds = tables["decode"]["rows"]
    assert set(zip(speeds["model"], speeds["batch"], speeds["kind"], strict=True)) == {
        (model, batch, kind) for model in ("dense", "pruned") for batch in (1, 2) for kind in ("measured", "predicted")
    }


def test_baselines_stand_beside_the_checkpoint(pages: dict[str, Path]) -> None:
    measured = json.loads((pages["folder"] / "ghostssm.json").read_text())["measured"]
    text = re.sub(r"\s*\n\s*", "", pages["prune"].read_text())
    assert "Beside baselines" in text
    assert "ghost is this checkpoint." in text
    assert [each["recipe"] for each in measured["compared"]] == ["ghost", "magnitude"]
    for each in measured["compared"]:
        told = f"{each['excess_loss']:.4f} ± {each['standard_error']:.4f}"
        assert re.search(rf"<td[^>]*>{each['recipe']}</td>.{{0,400}}{told}", text)
    rows = {figure["name"]: figure["tables"] for figure in data_of(pages["prune"])}["baselines"]["rows"]
    drawn = dict(zip(rows["method"], zip(rows["is"], rows["excess"], strict=True), strict=True))
    for each, kind in zip(measured["compared"], ("this checkpoint", "baseline"), strict=True):
        assert drawn[each["recipe"]] == (kind, pytest.approx(each["excess_loss"], rel=1e-3))
    assert "Beside baselines" not in pages["distill"].read_text()


def test_the_curve_of_a_distillation_is_that_of_the_plan(pages: dict[str, Path]) -> None:
    found = Plan.read(pages["healed"]).distillations[0]
    rows = {figure["name"]: figure["tables"] for figure in data_of(pages["distill"])}["distillation"]["points"]
    assert rows["tokens"] == [point.tokens for point in found.curve]
    assert len(rows["tokens"]) > 1
    for column, values in {
        "excess": [point.excess.mean for point in found.curve],
        "low": [point.excess.mean - point.excess.standard_error for point in found.curve],
        "high": [point.excess.mean + point.excess.standard_error for point in found.curve],
    }.items():
        np.testing.assert_allclose(rows[column], values, rtol=1e-3)
    marked = [step for step, kept in zip(rows["step"], rows["kept"], strict=True) if kept]
    assert marked == [found.kept_step]
    text = pages["distill"].read_text()
    assert f"{found.best.excess_text} after step {found.kept_step}, which was kept" in text
    assert f"{found.curve[0].excess.mean:.4f} → {found.best.excess.mean:.4f}" in text


def test_a_distilled_folder_is_repeated_by_distill(pages: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    plan, manifest = Plan.read(pages["healed"], changes=False), Manifest.read(pages["healed"])
    asked: list[DistillRequest] = []

    def carry_out(request: DistillRequest, **_: object) -> None:
        asked.append(request)
        raise InputError("enough")

    monkeypatch.setattr("ghostssm.workflows.distill.distill", carry_out)
    monkeypatch.setattr("ghostssm.cli.parsing.check_places", lambda request: None)  # it names folders of another place
    with pytest.raises(InputError, match="enough"):
        app(shlex.split(repeating_command(plan, manifest))[1:], standalone_mode=False)
    assert asked[0].as_json() == manifest.request
    assert f"<code>ghostssm report {pages['folder'].name}</code>" in pages["distill"].read_text()


def test_trainings_are_told_apart_and_need_no_standard_error(pages: dict[str, Path]) -> None:
    found = Plan.read(pages["healed"]).distillations[0]
    alone = tuple(dataclasses.replace(point, excess=Difference(point.excess.mean, math.nan)) for point in found.curve)
    figure = distillation_figure({"first": found, "second": dataclasses.replace(found, curve=alone)})
    rows = [row for row in figure.tables["points"] if row["training"] == "second"]
    assert all(row["low"] == row["excess"] == row["high"] for row in rows)
    assert [param["bind"]["options"] for param in figure.spec()["params"] if "bind" in param] == [["first", "second"]]
    assert "<svg" in figure.svg()


def test_a_folder_without_a_record_says_what_adds_it(pages: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(pages["folder"], tmp_path / "bare")
    (folder / RECORD_FILE).unlink()
    plan, report = Plan.read(folder), checkpoint_report(folder)
    assert [figure.name for figure in report.figures] == ["baselines", "capacity", "saliency"]
    assert any("--report" in command for _, command in report.missing)
    assert any("--evaluate" in command for _, command in report.missing)
    assert plan.provenance is not None
    sizes = dataclasses.replace(plan, per_layer=True, provenance=dataclasses.replace(plan.provenance, groups="pooled"))
    sizes.save(folder)
    (folder / "ghostssm.json").unlink()
    words = shlex.split(checkpoint_report(folder).missing[0][1])
    assert words[words.index("--state-size") + 1] == "4"
    assert words[words.index("--groups") + 1] == "pooled"
    assert "ghostssm.json" in " ".join(what for what, _ in checkpoint_report(folder).missing)
    for content in ("{", "[]", '{"format": "ghostssm-report", "version": 9}'):
        (folder / RECORD_FILE).write_text(content)
        with pytest.raises(InputError, match="is not a record that ghostssm wrote"):
            checkpoint_report(folder)


def test_the_command_asks_for_what_was_asked_for(pages: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = Manifest.read(pages["folder"])
    words = shlex.split(prune_command(Plan.read(pages["folder"]), manifest))
    asked: list[PruneRequest] = []

    def carry_out(request: PruneRequest, **_: object) -> None:
        asked.append(request)
        raise InputError("enough")

    monkeypatch.setattr("ghostssm.workflows.prune.prune", carry_out)
    monkeypatch.setattr("ghostssm.cli.parsing.check_places", lambda request: None)
    with pytest.raises(InputError, match="enough"):
        app(words[1:], standalone_mode=False)
    assert asked[0].as_json() == manifest.request
    assert words[-2:] == ["--output", "DIR"]


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"model": "org/m", "calibration": "wikitext2", "windows": 128, "groups": "equal"}, "org/m"),
        ({"model": "reference", "calibration": "wikitext2"}, "reference --calibration wikitext2"),
        (
            {"model": "reference", "calibration": "stdlib", "batches": [1, 8], "seed": 1},
            "reference --batch 1 8 --seed 1",
        ),
    ],
)
def test_what_a_command_does_anyway_is_left_out(asked: dict[str, Any], told: str) -> None:
    assert command("prune", asked) == f"ghostssm prune {told}"


def test_samples_are_what_the_models_say(pages: dict[str, Path]) -> None:
    folder = pages["folder"]
    plan = Plan.read(folder)
    samples = Record.read(folder, list(plan.selections), (2, 16)).samples
    assert samples is not None
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    text = (folder.parent / "text.txt").read_text()
    assert samples.prompt in text
    prompt = tokenizer(samples.prompt, return_tensors="pt", add_special_tokens=False)
    for name, place in (("dense", folder.parent / "model"), ("pruned", folder)):
        model = Mamba2ForCausalLM.from_pretrained(place)
        ids = model.generate(**prompt, max_new_tokens=64, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        assert tokenizer.decode(ids) == samples.continuations[name]


def test_the_best_are_told_by_class(pages: dict[str, Path]) -> None:
    text = pages["compare"].read_text()
    for size in (8, 4):
        stock = re.search(f"Best at N&#x27; = {size} in a stock checkpoint(.*?)</div></div>", text)
        assert stock is not None
        assert re.search(
            r"ghost.*excess loss [-0-9.]+ ± [0-9.]+; [0-9.]+x the dense speed at batch 2; runs in ", stock[1]
        )


def test_what_was_chosen_within_bounds_is_told_by_bounds() -> None:
    options: dict[str, Any] = {"evaluate": random_windows(2, 40, seed=1), "batches": [1]}
    found = ghostssm.compare(
        tiny_model(), random_windows(4, 40), methods=["ghost", "magnitude"], state_bytes=["1/2", "1/4"], **options
    )
    report = comparison_report(found)
    labels = [card.label for card in report.cards]
    assert labels[2:] == [f"Best within {bound} of the state's bytes in a stock checkpoint" for bound in ("1/2", "1/4")]
    rows = report.figures[0].tables["rows"]
    assert [row["method"] for row in rows] == ["ghost", "ghost", "magnitude", "magnitude"]
    assert [row["dtype"] for row in rows] == [row.state_dtype for row in found.rows[1:]]


def test_sequences_are_those_of_the_arithmetic(pages: dict[str, Path]) -> None:
    model = describe(str(pages["folder"].parent / "model"))
    rows = {figure["name"]: figure["tables"] for figure in data_of(pages["compare"])}["capacity"]["rows"]
    drawn = dict(zip(zip(rows["gpu"], rows["state"], strict=True), rows["sequences"], strict=True))
    for gpu, memory in (("24 GiB", 24 << 30), ("80 GiB", 80 << 30), ("141 GiB", 141 << 30)):
        for label, size in (("N = 16", 16), ("N' = 8", 8), ("N' = 4", 4)):
            assert drawn[gpu, label] == model.footprint(size).sequences(memory)


def test_what_can_be_no_loss_is_not_shown(pages: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(pages["folder"], tmp_path / "copy")
    manifest = json.loads((folder / "ghostssm.json").read_text())
    assert "Perplexity" in [card.label for card in checkpoint_report(folder).cards]
    for loss in (math.nan, -math.inf, 1e9, "much"):
        manifest["measured"]["dense_loss"] = loss
        (folder / "ghostssm.json").write_text(json.dumps(manifest))
        assert "Perplexity" not in [card.label for card in checkpoint_report(folder).cards]


def test_a_record_of_another_model_is_refused(pages: dict[str, Path]) -> None:
    names = list(Plan.read(pages["folder"]).selections)
    assert Record.read(pages["folder"], names, (2, 16)).observations is not None
    with pytest.raises(InputError, match="of other mixers"):
        Record.read(pages["folder"], names[1:], (2, 16))


def test_names_of_others_are_only_text(pages: dict[str, Path]) -> None:
    plan = dataclasses.replace(Plan.read(pages["folder"]), method=_HOSTILE)
    told = [Table(_HOSTILE, [], [[_HOSTILE, _HOSTILE]], _HOSTILE), Texts(_HOSTILE, {_HOSTILE: _HOSTILE}, _HOSTILE)]
    sections = [Section(_HOSTILE, [saliency_figure({_HOSTILE: plan}), *told])]
    page = html_page(Report(_HOSTILE, _HOSTILE, [], sections, details={"x": _HOSTILE}))
    assert "<script>alert" not in page
    assert escape(_HOSTILE) in page


def test_a_page_of_a_large_model_stays_small() -> None:
    draw = torch.Generator().manual_seed(0)
    names = [f"backbone.layers.{index}.mixer" for index in range(64)]
    values = {name: torch.rand(16, 128, dtype=torch.float64, generator=draw) for name in names}
    ordered = {name: value.sort(descending=True).values for name, value in values.items()}
    seen = Observations(values, values, ordered, "text", 4096)
    selection = Selection((tuple(range(32)),) * 16)
    plan = Plan("ghost", "mamba2", 16, 128, dict.fromkeys(names, Decision(selection)), scores=values)
    figures = [phantom_figure(seen, plan), hankel_figure(seen, plan), saliency_figure({"ghost": plan})]
    page = html_page(Report("large", "", [], [Section("", figures)]))
    assert len(page.encode()) < _LIMIT
    assert len(data_of(page)[0]["tables"]["channels"]["layer"]) <= MOST_CHANNELS


def heights_of(element: ElementTree.Element, top: float = 0.0) -> Iterator[tuple[str, float]]:
    """Every text of a picture and how far below the upper edge it stands."""
    moved = re.match(r"translate\([^,]*,([^)]*)\)", element.get("transform", ""))
    top += float(moved[1]) if moved else 0.0
    if element.text and element.tag.endswith("text"):
        yield element.text, top
    for child in element:
        yield from heights_of(child, top)


@pytest.mark.parametrize("width", [300, 640, 820])
def test_no_row_of_a_pictures_legend_is_cut_off(width: int) -> None:
    methods = ["magnitude", "random", "ghost", "output+repair", "output+refit100+repair", "balanced", "a+per-layer"]
    rows = [Row("dense", 16, 16, 10.0, 1.0, 0.0, 0.0, 4096, {}, 0.0)]
    rows += [Row(name, 8, 8, 11.0, 1.0, 0.1, 0.01, 2048, {}, 0.0) for name in methods]
    picture = ElementTree.fromstring(size_figure(rows).svg(width))
    labels = {text: height for text, height in heights_of(picture) if text in methods}
    assert set(labels) == set(methods)
    assert min(labels.values()) > 0
