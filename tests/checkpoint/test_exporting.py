"""Zero-padded states, and checkpoints rewritten in the other dialect."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

import ghostssm
from ghostssm.checkpoint.loading import Checkpoint
from ghostssm.errors import InputError, OutputError, PlanError
from ghostssm.evaluation import Evaluation
from ghostssm.evaluation.perplexity import measurement_of
from ghostssm.plan.plan import Plan
from tests.conftest import random_windows, tiny_model

FolderOf = Callable[..., Path]
IDS = torch.arange(1, 30)[None]


def logits_of(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits


def uneven_checkpoint(folder: Path, method: str = "ghost+per-layer") -> Checkpoint:
    """Of our own class: a state size per layer, or projected states."""
    checkpoint = ghostssm.load(str(folder))
    plan = ghostssm.Calibration(checkpoint.model, random_windows(4, 64)).plan(method, 6, multiple=1)
    model = ghostssm.apply_plan(checkpoint.model, plan)
    assert model.config.model_type == "ghost_mamba2"
    return Checkpoint(model, checkpoint.tokenizer, checkpoint.source)


@pytest.mark.parametrize("config", [{}, {"n_groups": 4, "use_bias": True}, {"n_groups": 2, "use_conv_bias": False}])
@pytest.mark.parametrize("accelerated", [False, True])
def test_padding_changes_no_logits(config: dict[str, Any], accelerated: bool) -> None:
    model = tiny_model(**config).double()
    if accelerated:
        ghostssm.accelerate(model)
    expected = logits_of(model)
    assert ghostssm.pad_state(model, 23) is model
    assert model.config.state_size == 23
    assert model.backbone.layers[0].mixer.conv1d.weight.shape[0] == 64 + 2 * 23 * config.get("n_groups", 1)
    torch.testing.assert_close(logits_of(model), expected, rtol=0, atol=1e-12)
    generated = model.generate(IDS[:, :5], max_new_tokens=8, do_sample=False)
    assert torch.equal(generated, tiny_model(**config).double().generate(IDS[:, :5], max_new_tokens=8, do_sample=False))


def test_uneven_layers_become_a_stock_model(folder_of: FolderOf, tmp_path: Path) -> None:
    checkpoint = uneven_checkpoint(folder_of())
    padded = ghostssm.pad_state(checkpoint.model, 16)
    assert type(padded).__name__ == "Mamba2ForCausalLM"
    torch.testing.assert_close(logits_of(padded), logits_of(checkpoint.model), rtol=0, atol=1e-5)
    other = Checkpoint(padded, checkpoint.tokenizer, checkpoint.source)
    written = ghostssm.export_checkpoint(other, tmp_path / "out")
    stored = json.loads((written / "config.json").read_text())
    assert stored["model_type"] == "mamba2"
    assert "auto_map" not in stored
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(written)), logits_of(padded))


def test_what_can_not_be_padded(folder_of: FolderOf) -> None:
    with pytest.raises(InputError, match="16 channels already"):
        ghostssm.pad_state(tiny_model(), 15)
    with pytest.raises(InputError, match="projected state can't be padded"):
        ghostssm.pad_state(uneven_checkpoint(folder_of(), "balanced").model, 16)


def test_our_own_class_is_refused_with_what_to_do(folder_of: FolderOf, tmp_path: Path) -> None:
    uneven = uneven_checkpoint(folder_of())
    projected = uneven_checkpoint(folder_of(), "balanced")
    for write in (
        lambda checkpoint: ghostssm.export_checkpoint(checkpoint, tmp_path / "out", dialect="mamba_ssm"),
        lambda checkpoint: ghostssm.export_gguf(checkpoint, tmp_path / "out"),
    ):
        with pytest.raises(InputError, match=r"size per layer.*--pad-to \d+"):
            write(uneven)
        with pytest.raises(InputError, match="projected states"):
            write(projected)
    assert not (tmp_path / "out").exists()


def test_there_and_back_again(folder_of: FolderOf, tmp_path: Path) -> None:
    source = folder_of(n_groups=2)
    (source / "README.md").write_text("# Card\n")
    (source / "ghostssm.json").write_text(json.dumps({"base_model": "org/base", "dialect": "transformers"}))
    checkpoint = ghostssm.load(str(source))
    theirs = ghostssm.export_checkpoint(checkpoint, tmp_path / "theirs", dialect="mamba_ssm")
    assert json.loads((theirs / "config.json").read_text())["ssm_cfg"]["d_state"] == 16
    manifest = json.loads((theirs / "ghostssm.json").read_text())
    facts = {"base_model": "org/base", "dialect": "mamba_ssm", "stored_state_size": 16}
    assert manifest | facts == manifest
    assert manifest["probe"]
    assert "pytorch_model.bin" in manifest["files"]
    assert {"pytorch_model.bin", "README.md", "tokenizer.json", "generation_config.json"} <= {
        path.name for path in theirs.iterdir()
    }
    ours = ghostssm.export_checkpoint(ghostssm.load(str(theirs)), tmp_path / "ours", with_tokenizer=False)
    assert not (ours / "tokenizer.json").exists()
    again = AutoModelForCausalLM.from_pretrained(ours)
    assert torch.equal(logits_of(again), logits_of(tiny_model(n_groups=2)))
    assert (ours / "README.md").read_text() == "# Card\n"
    with pytest.raises(OutputError, match="not empty"):
        ghostssm.export_checkpoint(checkpoint, tmp_path / "ours")


def pruned_folder(folder_of: FolderOf, tmp_path: Path, recipe: str = "ghost") -> Path:
    """Pruned from N = 16, of a base model with a card and a place on the hub, with a measured loss."""
    base = folder_of()
    (base / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n")
    checkpoint = ghostssm.load(str(base))
    plan = ghostssm.Calibration(checkpoint.model, random_windows(4, 64)).plan(recipe, 4, multiple=1)
    model = ghostssm.apply_plan(checkpoint.model, plan)
    source = dataclasses.replace(checkpoint.source, name="someone/base", hub_id="someone/base")
    dense, pruned = (Evaluation(torch.tensor([2.0, loss], dtype=torch.float64), 1.0) for loss in (3.0, 3.5))
    measured = measurement_of(random_windows(2, 40), dense, pruned)
    smaller = Checkpoint(model, checkpoint.tokenizer, source)
    return ghostssm.save(smaller, plan, tmp_path / "pruned", measured=measured)


def test_the_card_tells_what_is_written(folder_of: FolderOf, tmp_path: Path) -> None:
    pruned = pruned_folder(folder_of, tmp_path)
    first = ModelCard.load(pruned / "README.md")
    assert "- does not run in mamba_ssm before `ghostssm export PATH --format mamba_ssm`" in first.text
    theirs = ghostssm.export_checkpoint(ghostssm.load(str(pruned)), tmp_path / "theirs", dialect="mamba_ssm")
    card = ModelCard.load(theirs / "README.md")
    assert "MambaLMHeadModel" in card.text
    assert "AutoModelForCausalLM" not in card.text
    assert "- runs in mamba_ssm\n" in card.text
    plan = Plan.read(pruned, changes=False)
    at_once = ghostssm.save(ghostssm.load(str(pruned)), plan, tmp_path / "at-once", dialect="mamba_ssm")
    saved = ModelCard.load(at_once / "README.md")
    assert card.data.library_name == saved.data.library_name != first.data.library_name
    back = ghostssm.export_checkpoint(ghostssm.load(str(theirs)), tmp_path / "back")
    assert ModelCard.load(back / "README.md").content == first.content
    for kept in (
        "base_model: someone/base",
        "license: mit",
        "language: en",
        "| this model | 2.7500 | 0.2500 ± 0.2500 |",
    ):
        assert kept in card.content
    assert "mit, as the base model's" in card.text
    assert "# someone/base with a state size of 4\n" in card.text
    assert ghostssm.verify(theirs).passed


@pytest.mark.parametrize("recipe", ["ghost", "ghost+per-layer"])
def test_the_card_tells_padding_from_what_was_kept(folder_of: FolderOf, tmp_path: Path, recipe: str) -> None:
    checkpoint = ghostssm.load(str(pruned_folder(folder_of, tmp_path, recipe)))
    padded = Checkpoint(ghostssm.pad_state(checkpoint.model, 16), checkpoint.tokenizer, checkpoint.source)
    card = ModelCard.load(ghostssm.export_checkpoint(padded, tmp_path / "padded") / "README.md").text
    plan = Plan.read(tmp_path / "pruned", changes=False)
    least, most = min(plan.state_sizes), max(plan.state_sizes)
    size = "4" if recipe == "ghost" else f"{least} to {most}"
    assert f"| state size | 16 | {size}, padded to 16 |" in card
    assert "| state per sequence, float32 | 12,288 bytes | 12,288 bytes |" in card
    parameters = f"{padded.model.num_parameters():,}"
    assert f"| parameters | {parameters} | {parameters} |" in card
    assert "Channels of zeros" in card
    assert "less state" not in card
    assert "trust_remote_code" not in card


def test_a_broken_plan_is_not_carried_on(folder_of: FolderOf, tmp_path: Path) -> None:
    pruned = pruned_folder(folder_of, tmp_path)
    (pruned / "plan.json").write_text("{}")
    with pytest.raises(PlanError, match="not a valid plan"):
        ghostssm.export_checkpoint(ghostssm.load(str(pruned)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("pruned", [False, True])
def test_untying_a_finished_model(folder_of: FolderOf, tmp_path: Path, pruned: bool) -> None:
    checkpoint = ghostssm.load(str(pruned_folder(folder_of, tmp_path) if pruned else folder_of()))
    written = ghostssm.export_checkpoint(checkpoint, tmp_path / "out", untie=True)
    tensors = safetensors.torch.load_file(written / "model.safetensors")
    assert torch.equal(tensors["lm_head.weight"], tensors["backbone.embeddings.weight"])
    assert json.loads((written / "config.json").read_text())["tie_word_embeddings"] is False
    assert checkpoint.model.config.tie_word_embeddings
    stock = AutoModelForCausalLM.from_pretrained(written)
    assert torch.equal(logits_of(stock), logits_of(checkpoint.model))
    if pruned:
        assert "vllm, sglang" in (written / "README.md").read_text()
        assert ghostssm.verify(written).passed
    with pytest.raises(InputError, match=r"always stores lm_head\.weight"):
        ghostssm.export_checkpoint(checkpoint, tmp_path / "theirs", dialect="mamba_ssm", untie=True)
    assert not (tmp_path / "theirs").exists()
