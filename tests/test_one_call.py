"""Pruning and measuring in one call, of whatever is at hand, against transformers."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import ghostssm
from ghostssm.text import sources
from tests.conftest import tiny_model

IDS = torch.randint(1, 288, (4, 48), generator=torch.Generator().manual_seed(1))
OTHER_IDS = torch.randint(1, 288, (3, 48), generator=torch.Generator().manual_seed(2))
STRINGS = [f"{n} men went to mow, went to mow a meadow {n * n}\n" for n in range(100)]


def loss_by_transformers(model: Any, ids: torch.Tensor) -> float:
    with torch.no_grad():
        return float(torch.stack([model(input_ids=row[None], labels=row[None]).loss for row in ids]).mean())


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=OTHER_IDS).logits


def test_a_model_in_memory_is_pruned_without_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny_model()
    outcome = ghostssm.prune(model, IDS, state_size=8, recipe="ghost", evaluate=OTHER_IDS)
    assert outcome.checkpoint is not None
    assert outcome.measured is not None
    assert torch.equal(logits(model), logits(tiny_model()))
    pruned = outcome.checkpoint.model
    assert pruned.config.state_size == 8
    assert torch.equal(logits(pruned), logits(ghostssm.apply_plan(tiny_model(), outcome.plan)))
    assert outcome.measured.dense_loss == pytest.approx(loss_by_transformers(model, OTHER_IDS), rel=1e-5)
    assert outcome.measured.pruned_loss == pytest.approx(loss_by_transformers(pruned, OTHER_IDS), rel=1e-5)
    assert (outcome.written, list(tmp_path.iterdir())) == (None, [])


@pytest.mark.parametrize("kind", ["folder", "path", "checkpoint", "model"])
def test_every_kind_of_model_gives_the_same_plan(kind: str, small: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    given: dict[str, Callable[[], Any]] = {
        "folder": lambda: str(small),
        "path": lambda: small,
        "checkpoint": lambda: ghostssm.load(str(small)),
        "model": lambda: AutoModelForCausalLM.from_pretrained(small),
    }
    own = AutoTokenizer.from_pretrained(small) if kind == "model" else None
    options: dict[str, Any] = {"state_size": 8, "recipe": "magnitude", "windows": 4, "window_length": 64}
    outcome = ghostssm.prune(given[kind](), STRINGS, tokenizer=own, **options)
    text = ghostssm.Text.from_strings(STRINGS)
    windows = ghostssm.cut_windows(text, tokenizer, 64, 4, seed=42)
    assert outcome.plan == ghostssm.Calibration(tiny_model(), windows).plan("magnitude", 8)


def test_what_is_written_is_what_the_outcome_holds(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    options: dict[str, Any] = {"state_size": 8, "recipe": "output+repair", "windows": 4, "window_length": 64}
    outcome = ghostssm.prune(tiny_model(), STRINGS, tokenizer=tokenizer, output=tmp_path / "out", **options)
    assert outcome.written == tmp_path / "out"
    assert outcome.checkpoint is not None
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(outcome.checkpoint.model))
    assert ghostssm.verify(tmp_path / "out").passed
    asked = ghostssm.Manifest.read(tmp_path / "out").request
    assert asked is not None
    assert (asked["calibration"], asked["windows"], asked["recipe"]) == ("strings", 4, "output+repair")
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("mow").input_ids == tokenizer("mow").input_ids


def test_names_alone_are_a_request(small: Path, text_file: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"state_size": 8, "recipe": "ghost", "windows": 4, "window_length": 64}
    called = ghostssm.prune(small, text_file, output=tmp_path / "a", **options)
    request = ghostssm.PruneRequest(str(small), str(tmp_path / "b"), calibration=str(text_file), **options)
    asked = ghostssm.prune(request)
    assert called.plan == asked.plan == ghostssm.Plan.read(tmp_path / "a", changes=False)
    manifests = [ghostssm.Manifest.read(tmp_path / name) for name in "ab"]
    assert manifests[0].request == manifests[1].request
    # Without an output the request stays in memory too.
    kept = ghostssm.prune(ghostssm.PruneRequest(str(small), calibration=str(text_file), **options))
    assert (kept.written, kept.plan) == (None, asked.plan)


def test_recipes_default_as_in_the_command() -> None:
    outcome = ghostssm.prune(tiny_model(num_hidden_layers=1), IDS, state_size=8)
    assert outcome.plan.method == str(ghostssm.Recipe.parse(ghostssm.PruneRequest.recipe))


def test_evaluate_takes_models_texts_and_ids(small: Path, text_file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model()
    expected = loss_by_transformers(model, IDS)
    for given in (IDS, IDS.tolist(), ghostssm.Windows.from_ids(IDS)):
        assert ghostssm.evaluate(model, given).loss == pytest.approx(expected, rel=1e-5)
    windows = ghostssm.evaluation_windows(ghostssm.read_text(text_file), tokenizer, 64, 5)
    losses = [
        ghostssm.evaluate(where, text, windows=5, window_length=64, tokenizer=tokenizer).losses
        for where in (model, small, str(small), ghostssm.load(str(small)))
        for text in (text_file, text_file.read_text())
    ]
    by_ids = ghostssm.evaluate(model, windows).losses
    assert all(torch.equal(each, by_ids) for each in losses)
    streamed = ghostssm.evaluate(ghostssm.stream(str(small)), text_file, windows=5, window_length=64)
    assert streamed.loss == pytest.approx(by_ids.mean().item(), rel=1e-6)


def test_a_plain_model_is_saved_and_exported(tmp_path: Path) -> None:
    model = tiny_model()
    model.generation_config.temperature = 0.7
    model.generation_config.do_sample = True
    plan = ghostssm.Calibration(model, ghostssm.Windows.from_ids(IDS)).plan("ghost", 8)
    smaller = ghostssm.apply_plan(model, plan)
    ghostssm.save(smaller, plan, tmp_path / "a")
    ghostssm.export_checkpoint(smaller, tmp_path / "b")
    for name in "ab":
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert torch.equal(logits(loaded), logits(smaller))
        assert loaded.generation_config.temperature == 0.7
    assert ghostssm.verify(tmp_path / "a").passed
    assert ghostssm.Manifest.read(tmp_path / "a").base_model_sha256 is None
    pytest.importorskip("gguf")
    with pytest.raises(ghostssm.ModelError, match=r"ghostssm.Checkpoint\(model, AutoTokenizer"):
        ghostssm.export_gguf(smaller, tmp_path / "c.gguf")
    assert ghostssm.export_gguf(smaller, tmp_path / "c.gguf", with_tokenizer=False).path.exists()


def test_a_model_has_its_name_and_not_its_place(tmp_path: Path) -> None:
    model = tiny_model()
    for path, name, hub_id in (
        ("org/model", "org/model", "org/model"),
        (str(tmp_path), tmp_path.name, None),
        ("", "mamba2", None),
    ):
        model.config.name_or_path = path
        source = ghostssm.Checkpoint(model).source
        assert (source.published_name, source.hub_id) == (name, hub_id)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (
            lambda model: ghostssm.prune(model, IDS, budget=0.5, state_siz=8),
            "No option is called 'state_siz'; expected one of: .* Did you mean 'state_size'\\?",
        ),
        (
            lambda model: ghostssm.prune(model, IDS, budget=0.5, calibration="a"),
            "No option is called 'calibration'; expected one of",
        ),
        (lambda model: ghostssm.prune(model, IDS, state_sise=8), "Did you mean 'state_size'\\?"),
        (lambda model: ghostssm.prune(model, IDS), r"how much to keep: ghostssm.prune\(model, text, state_size=64\)"),
        (lambda model: ghostssm.prune(model, IDS, state_size="8"), "expected a whole number"),
        (lambda model: ghostssm.prune(model, IDS, state_size=8, report=True), "with --output only"),
        (lambda model: ghostssm.prune(model, IDS, state_size=8, device="meta"), "is on cpu already"),
        (lambda model: ghostssm.prune(model, IDS, state_size=8, output="a", stream=True), "reads model and texts from"),
        (lambda model: ghostssm.prune(model, IDS, state_size=8, column="text"), "leave it out"),
        (lambda model: ghostssm.prune(model, STRINGS, state_size=8), "tokenizer=AutoTokenizer"),
        (lambda model: ghostssm.prune(model, STRINGS, state_size=8, tokenizer="a"), "its tokenizer is 'a'"),
        (lambda model: ghostssm.prune(model, IDS + 999, state_size=8), "the model knows 288"),
        (lambda model: ghostssm.prune([model], IDS, state_size=8), "Found a list in place of a model"),
        (lambda model: ghostssm.prune(model, 7, state_size=8), r"ghostssm.prune\(model, \['One text"),
        (lambda model: ghostssm.prune(model, "A text.", state_size=8), r"In Python: ghostssm.Text.from_strings"),
        (lambda model: ghostssm.prune("a", "A text.", state_size=8), r"In Python: ghostssm.Text.from_strings"),
        (lambda model: ghostssm.evaluate(None, IDS), "in place of a model"),
        (lambda model: ghostssm.evaluate(model, None), "in place of a text"),
        (lambda model: ghostssm.Checkpoint(model, "gpt2"), "in place of a tokenizer"),
        (lambda model: ghostssm.Checkpoint("folder"), "in place of a model"),
        (lambda model: ghostssm.save(model, "plan", "folder"), r"ghostssm.save\(model, plan, folder\)"),
        (lambda model: ghostssm.save("model", "plan", "folder"), "in place of a model"),
        (lambda model: ghostssm.export_gguf("model", "file"), "in place of a model"),
    ],
)
def test_wrong_arguments_are_told(
    call: Callable[[Any], Any], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ghostssm.InputError, match=told):
        call(tiny_model())
    assert list(tmp_path.iterdir()) == []


def test_a_comparison_of_what_is_in_memory(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model()
    options: dict[str, Any] = {"state_sizes": [8, 4], "methods": ["ghost", "magnitude"], "batches": ()}
    found = ghostssm.compare(model, IDS, evaluate=OTHER_IDS, **options)
    assert torch.equal(logits(model), logits(tiny_model()))
    assert [(row.method, row.state_size) for row in found.rows] == [
        ("dense", 16),
        *((method, size) for method in ("ghost", "magnitude") for size in (8, 4)),
    ]
    for row in found.rows[1:]:
        with ghostssm.pruned(model, found.plans[row.method, row.state_size]) as smaller:
            assert math.log(row.perplexity) == pytest.approx(loss_by_transformers(smaller, OTHER_IDS), rel=1e-5)
    one = ghostssm.compare(model, IDS, 8, "ghost", evaluate=OTHER_IDS, batches=())
    assert one.rows[1].perplexity == found.rows[1].perplexity


def test_a_comparison_holds_out_windows_of_a_text_of_ones_own(tokenizer: PreTrainedTokenizerFast) -> None:
    options: dict[str, Any] = {"tokenizer": tokenizer, "windows": 8, "window_length": 64, "batches": ()}
    basis = ghostssm.compare(tiny_model(), STRINGS, 8, "magnitude", **options).basis
    assert basis is not None
    assert (len(basis.calibration), len(basis.evaluation)) == (6, 2)
    rows = {tuple(row) for row in basis.calibration.ids.tolist()}
    assert not any(tuple(row) in rows for row in basis.evaluation.ids.tolist())
    with pytest.raises(ghostssm.InputError, match="none to measure on"):
        ghostssm.compare(tiny_model(), IDS[:1], 8, "magnitude", batches=())
    with pytest.raises(ghostssm.InputError, match=r"state_sizes=\[96, 64\]"):
        ghostssm.compare(tiny_model(), IDS)


def test_a_named_corpus_is_measured_on_its_other_side(
    small: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "stdlib_texts", lambda held_out: [f"{held_out} " * 200])
    options: dict[str, Any] = {"windows": 4, "window_length": 64, "batches": ()}
    for model, own in ((small, None), (tiny_model(), tokenizer)):
        basis = ghostssm.compare(model, "stdlib", 8, "magnitude", tokenizer=own, **options).basis
        assert basis is not None
        names = (basis.calibration.text_name, basis.evaluation.text_name)
        assert names == ("stdlib (calibration modules)", "stdlib (held-out modules)")


def test_a_comparison_becomes_data_a_chart_and_a_page(tmp_path: Path) -> None:
    found = ghostssm.compare(tiny_model(), IDS, 8, "ghost", batches=[1])
    assert repr(found) == "<Comparison: dense, ghost at state sizes 16, 8>"
    again = json.loads(json.dumps(found.to_dict()))
    assert [row["perplexity"] for row in again["rows"]] == [row.perplexity for row in found.rows]
    assert again["request"]["methods"] == ["ghost"]
    pytest.importorskip("altair")
    for shown in (found, found.plans["ghost", 8]):
        ghostssm.plot(shown).save(tmp_path / "figure.svg")
        assert (tmp_path / "figure.svg").read_text().startswith("<svg")
    page = ghostssm.write_report(found, tmp_path / "page.html")
    assert "ghost" in page.read_text()
    for wrong in (7, None, [1]):
        with pytest.raises(ghostssm.InputError, match="expected"):
            ghostssm.plot(wrong)
        with pytest.raises(ghostssm.InputError, match="expected"):
            ghostssm.write_report(wrong, tmp_path / "other.html")
    assert not (tmp_path / "other.html").exists()


def test_a_data_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    found = ghostssm.compare(tiny_model(), IDS, 8, "magnitude", batches=[1])
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pandas", None)
        with pytest.raises(ghostssm.InputError, match="pip install pandas"):
            found.to_pandas()
    pytest.importorskip("pandas", reason="pandas is not installed")
    frame = found.to_pandas()
    assert list(frame["perplexity"]) == [row.perplexity for row in found.rows]
    assert list(frame["tokens_per_second_1"]) == [row.tokens_per_second[1] for row in found.rows]


def test_arguments_beside_a_request_are_refused() -> None:
    request = ghostssm.PruneRequest("reference", state_size=4)
    with pytest.raises(ghostssm.InputError, match="A PruneRequest says everything; leave evaluate, recipe, text out"):
        ghostssm.prune(request, IDS, recipe="ghost", evaluate="stdlib")
    with pytest.raises(ghostssm.InputError, match="A CompareRequest says everything; leave state_sizes out"):
        ghostssm.compare(ghostssm.CompareRequest("reference", (4,)), state_sizes=8)


def test_one_value_stands_for_a_list_of_one() -> None:
    ids = torch.cat([IDS, OTHER_IDS])
    found = ghostssm.compare(tiny_model(), ids, state_bytes="1/4", methods="magnitude", batches=1)
    assert {batch for row in found.rows for batch in row.tokens_per_second} == {1}
    assert {bound for row in found.rows for bound in row.within} == {"1/4"}
