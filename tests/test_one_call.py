"""Pruning and measuring in one call, of whatever is at hand, against transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import ghostssm
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
        (lambda model: ghostssm.prune(model, IDS, state_siz=8), "no option 'state_siz'; did you mean state_size"),
        (lambda model: ghostssm.prune(model, IDS, calibration="a"), "no option 'calibration'; expected any of"),
        (lambda model: ghostssm.prune(model, IDS), "how much to keep"),
        (lambda model: ghostssm.prune(model, IDS, state_size="8"), "expected an integer from 1"),
        (lambda model: ghostssm.prune(model, IDS, state_size=8, report=True), "with --output only"),
        (lambda model: ghostssm.prune(model, IDS, state_size=8, device="meta"), "is on cpu already"),
        (lambda model: ghostssm.prune(model, IDS, state_size=8, output="a", stream=True), "reads model and texts from"),
        (lambda model: ghostssm.prune(model, IDS, state_size=8, column="text"), "leave it out"),
        (lambda model: ghostssm.prune(model, STRINGS, state_size=8), "tokenizer=AutoTokenizer"),
        (lambda model: ghostssm.prune(model, STRINGS, state_size=8, tokenizer="a"), "its tokenizer is 'a'"),
        (lambda model: ghostssm.prune(model, IDS + 999, state_size=8), "the model knows 288"),
        (lambda model: ghostssm.prune([model], IDS, state_size=8), "Found a list in place of a model"),
        (lambda model: ghostssm.prune(model, 7, state_size=8), r"ghostssm.prune\(model, \['One text"),
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
