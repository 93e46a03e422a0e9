"""The model card, read back by the hub's own client."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

import ghostssm
from ghostssm.checkpoint.source import Source
from ghostssm.evaluation import Evaluation
from ghostssm.evaluation.perplexity import evaluate_in_float32, measurement_of
from ghostssm.plan.measurement import Difference
from tests.checkpoint.test_round_trip import pruned_checkpoint
from tests.conftest import VOCABULARY, random_windows, tiny_model

BASE_CARD = """---
license: other
license_name: some-licence
license_link: https://example.org/licence
language: [en, de]
tags: [base]
model-index: []
---
# Base
"""


def card_of(folder: Path, tmp_path: Path, hub_id: str | None = None, **options: Any) -> ModelCard:
    checkpoint, plan = pruned_checkpoint(folder)
    source = Source(hub_id or str(folder), folder, checkpoint.source.config, checkpoint.source.dialect, hub_id)
    written = ghostssm.save(
        ghostssm.Checkpoint(checkpoint.model, checkpoint.tokenizer, source), plan, tmp_path / "out", **options
    )
    return ModelCard.load(written / "README.md")


def test_base_model_and_licence_are_inherited(folder_of: Callable[..., Path], tmp_path: Path) -> None:
    folder = folder_of()
    (folder / "README.md").write_text(BASE_CARD)
    card = card_of(folder, tmp_path, hub_id="someone/mamba2-tiny")
    data = card.data.to_dict()
    assert data["base_model"] == "someone/mamba2-tiny"
    assert data["base_model_relation"] == "finetune"
    assert (data["license"], data["license_name"]) == ("other", "some-licence")
    assert data["license_link"] == "https://example.org/licence"
    assert data["language"] == ["en", "de"]
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "text-generation")
    assert {"mamba2", "pruned", "ghostssm"} <= set(data["tags"])
    assert "base" not in data["tags"]
    assert "# someone/mamba2-tiny with a state size of 5" in card.text
    assert "| state size | 16 | 5 |" in card.text
    assert "`ghost`" in card.text
    assert "1 windows of 40 tokens of random" in card.text
    assert "AutoModelForCausalLM.from_pretrained" in card.text
    assert "some-licence, as the base model's" in card.text


@pytest.mark.parametrize("front", [None, "---\n: [\n---\n", "no metadata", "---\n- a list\n---\n"])
def test_without_a_usable_base_card(folder_of: Callable[..., Path], tmp_path: Path, front: str | None) -> None:
    folder = folder_of()
    if front is not None:
        (folder / "README.md").write_text(front)
    card = card_of(folder, tmp_path)
    data = card.data.to_dict()
    assert "license" not in data
    assert "base_model" not in data
    assert "files name no licence" in card.text
    assert str(tmp_path) not in card.content


def test_a_licence_in_the_config(folder_of: Callable[..., Path], tmp_path: Path) -> None:
    folder = folder_of()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"license": "mit"}))
    assert card_of(folder, tmp_path).data.license == "mit"


def test_the_measured_table(folder_of: Callable[..., Path], tmp_path: Path) -> None:
    dense = Evaluation(torch.tensor([2.0, 3.0], dtype=torch.float64), 1.0)
    pruned = Evaluation(torch.tensor([2.5, 3.1], dtype=torch.float64), 1.0)
    measured = measurement_of(random_windows(2, 40), dense, pruned)
    assert measured.excess == Difference(pytest.approx(0.3), pytest.approx(0.2))
    card = card_of(folder_of(), tmp_path, measured=measured)
    assert "| base model | 2.5000 | |" in card.text
    assert "| this model | 2.8000 | 0.3000 ± 0.2000 |" in card.text
    manifest = json.loads((tmp_path / "out" / "ghostssm.json").read_text())
    assert manifest["measured"]["excess_loss"] == pytest.approx(0.3)
    one = measurement_of(random_windows(1, 40), Evaluation(dense.losses[:1], 1.0), Evaluation(pruned.losses[:1], 1.0))
    assert one.excess_text == "0.5000"
    assert one.as_json()["standard_error"] is None


def test_half_precision_is_measured_in_float32() -> None:
    windows = random_windows(2, 20)
    half = tiny_model().bfloat16()
    found = evaluate_in_float32(half, windows)
    assert half.dtype == torch.bfloat16
    assert torch.equal(found.losses, ghostssm.evaluate(tiny_model().bfloat16().float(), windows).losses)


def test_the_other_dialect_and_the_tied_head(folder_of: Callable[..., Path], tmp_path: Path) -> None:
    card = card_of(folder_of(), tmp_path, dialect="mamba_ssm")
    assert card.data.to_dict()["library_name"] == "mamba-ssm"
    assert "MambaLMHeadModel" in card.text
    assert "mamba_ssm before" not in card.text
    assert re.search("does not run in transformers-cpu, vllm before `ghostssm export PATH --format transf", card.text)
    for options, line in (
        ({}, "- does not run in sglang before `ghostssm export PATH --format transformers --untie`"),
        ({"untie": True}, "- runs in transformers-cpu, vllm, sglang"),
    ):
        text = card_of(folder_of(f"base{len(options)}"), tmp_path, overwrite=True, **options).text
        assert line in text
        assert "after `ghostssm export PATH --format gguf`" in text


def parameters_row(folder: Path) -> list[int]:
    """Numbers of parameters before and after, as the card has them."""
    (row,) = (line for line in (folder / "README.md").read_text().splitlines() if line.startswith("| parameters "))
    return [int(cell.replace(",", "")) for cell in row.split("|")[2:4]]


def count(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("recipe", "wording"),
    [
        ("ghost", "rows of in_proj and conv1d that made the removed channels are gone"),
        ("ghost+per-layer", "rows of in_proj and conv1d that made the removed channels are gone"),
        ("balanced", "No weight became smaller"),
        ("balanced+per-layer", "No weight became smaller"),
    ],
)
def test_parameters_before_and_after(folder_of: Callable[..., Path], tmp_path: Path, recipe: str, wording: str) -> None:
    checkpoint = ghostssm.load(str(folder_of(n_groups=2)))
    before = count(checkpoint.model)
    plan = ghostssm.Calibration(checkpoint.model, random_windows(4, 64)).plan(recipe, 6, multiple=1)
    model = ghostssm.apply_plan(checkpoint.model, plan)
    smaller = ghostssm.Checkpoint(model, checkpoint.tokenizer, checkpoint.source)
    written = ghostssm.save(smaller, plan, tmp_path / "out")
    assert parameters_row(written) == [before, count(model)]
    assert (count(model) > before) == recipe.startswith("balanced")
    assert wording in (written / "README.md").read_text()


def test_a_head_stored_apart_is_counted(folder_of: Callable[..., Path], tmp_path: Path) -> None:
    card_of(folder_of(), tmp_path)
    before, tied = parameters_row(tmp_path / "out")
    card = card_of(tmp_path / "model", tmp_path, overwrite=True, untie=True)
    after = tied + VOCABULARY * 32
    assert parameters_row(tmp_path / "out") == [before, after]
    assert "is stored as a weight of its own" in card.text
    exported = ghostssm.export_checkpoint(ghostssm.load(str(tmp_path / "out")), tmp_path / "again")
    assert parameters_row(exported) == [before, after]
    assert "is stored as a weight of its own" in (exported / "README.md").read_text()
