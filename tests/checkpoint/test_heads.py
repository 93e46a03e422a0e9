"""Heads with values of their own, whatever the config says: what is stored is what is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import ghostssm
from tests.conftest import Run, random_windows, tiny_model
from tests.families.tiny import tiny_hybrid

FolderOf = Callable[..., Path]
IDS = torch.arange(1, 30)[None]
EMBEDDINGS, HEAD = "backbone.embeddings.weight", "lm_head.weight"


def logits_of(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def with_head(folder: Path, factor: float = 2.0, embeddings: str = EMBEDDINGS) -> Path:
    """Store a head beside the embeddings that it is tied to, as adapters leave it that were merged into it."""
    tensors = load_file(folder / "model.safetensors")
    tensors[HEAD] = tensors[embeddings] * factor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert config_of(folder)["tie_word_embeddings"] is True
    return folder


def decided(model: Any, method: str = "ghost") -> ghostssm.Plan:
    return ghostssm.Calibration(model, random_windows(2, 40)).plan(method, 5)


def test_the_config_in_memory_says_what_the_tensors_are(folder_of: FolderOf) -> None:
    folder = with_head(folder_of())
    for model in (ghostssm.load(str(folder)).model, ghostssm.stream(str(folder)).model):
        assert model.config.tie_word_embeddings is False
    expected = logits_of(AutoModelForCausalLM.from_pretrained(folder, tie_word_embeddings=False))
    assert torch.equal(logits_of(ghostssm.load(str(folder)).model), expected)
    assert not torch.equal(expected, logits_of(tiny_model()))


def test_a_head_that_equals_the_embeddings_is_tied(folder_of: FolderOf, tmp_path: Path) -> None:
    folder = with_head(folder_of(), factor=1.0)
    for model in (ghostssm.load(str(folder)).model, ghostssm.stream(str(folder)).model):
        assert model.config.tie_word_embeddings is True
    written = ghostssm.export_checkpoint(ghostssm.load(str(folder)), tmp_path / "out")
    assert HEAD not in load_file(written / "model.safetensors")
    assert ghostssm.describe(str(folder)).tied_head


def test_equal_once_rounded_is_tied_on_both_roads(folder_of: FolderOf) -> None:
    """transformers compares in the dtype that the model has in memory."""
    folder = folder_of()
    tiny_model().bfloat16().float().save_pretrained(folder)
    with_head(folder, factor=1 + 1e-6)
    for dtype, tied in ((torch.float32, False), (torch.bfloat16, True)):
        assert ghostssm.load(str(folder), dtype=dtype).model.config.tie_word_embeddings is tied
        assert ghostssm.stream(str(folder), dtype=dtype).model.config.tie_word_embeddings is tied


@pytest.mark.parametrize("method", ["ghost", "balanced"])
@pytest.mark.parametrize("untie", [False, True])
def test_pruned_in_memory(folder_of: FolderOf, tmp_path: Path, method: str, untie: bool) -> None:
    checkpoint = ghostssm.load(str(with_head(folder_of())))
    plan = decided(checkpoint.model, method)
    model = ghostssm.apply_plan(checkpoint.model, plan)
    smaller = ghostssm.Checkpoint(model, checkpoint.tokenizer, checkpoint.source)
    written = ghostssm.save(smaller, plan, tmp_path / "out", untie=untie)
    assert config_of(written)["tie_word_embeddings"] is False
    assert json.loads((written / "ghostssm.json").read_text())["untied_head"] is False
    assert ghostssm.verify(written).passed
    assert torch.equal(logits_of(ghostssm.load(str(written)).model), logits_of(model))
    stored = load_file(written / "model.safetensors")
    assert torch.equal(stored[HEAD], stored[EMBEDDINGS] * 2)


def test_streamed(folder_of: FolderOf, tmp_path: Path) -> None:
    checkpoint = ghostssm.stream(str(with_head(folder_of())), head=False)
    ghostssm.prune_streamed(checkpoint, random_windows(2, 40), "ghost", 5, tmp_path / "out")
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False
    model = ghostssm.load(str(tmp_path / "out")).model
    assert torch.equal(model.lm_head.weight, model.backbone.embeddings.weight * 2)
    assert ghostssm.verify(tmp_path / "out").passed


def test_mamba_ssm_there_and_back(folder_of: FolderOf, tmp_path: Path) -> None:
    expected = logits_of(ghostssm.load(str(with_head(folder_of()))).model)
    place = tmp_path / "model"
    for name, dialect in (("theirs", "mamba_ssm"), ("again", "mamba_ssm"), ("ours", "transformers")):
        written = ghostssm.export_checkpoint(ghostssm.load(str(place)), tmp_path / name, dialect=dialect)  # type: ignore[arg-type]
        key = "tie_embeddings" if dialect == "mamba_ssm" else "tie_word_embeddings"
        assert config_of(written)[key] is False
        assert torch.equal(logits_of(ghostssm.load(str(written)).model), expected)
        place = written


def test_mamba_ssm_config_that_ties_another_head(folder_of: FolderOf, tmp_path: Path) -> None:
    theirs = ghostssm.export_checkpoint(ghostssm.load(str(folder_of())), tmp_path / "theirs", dialect="mamba_ssm")
    state = torch.load(theirs / "pytorch_model.bin", weights_only=True)
    torch.save(state | {HEAD: state[HEAD] * 2}, theirs / "pytorch_model.bin")
    assert config_of(theirs)["tie_embeddings"] is True
    assert not ghostssm.describe(str(theirs)).tied_head
    again = ghostssm.export_checkpoint(ghostssm.load(str(theirs)), tmp_path / "again", dialect="mamba_ssm")
    assert config_of(again)["tie_embeddings"] is False


def test_gguf_has_the_head(folder_of: FolderOf, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="needs gguf: pip install 'ghostssm[gguf]'")
    for factor, expected in ((1.0, set()), (2.0, {"output.weight"})):
        folder = with_head(folder_of(f"times {factor}"), factor)
        written = ghostssm.export_gguf(ghostssm.load(str(folder)), tmp_path / f"{factor}.gguf")
        names = {tensor.name for tensor in gguf.GGUFReader(written.path).tensors}
        assert names & {"output.weight"} == expected


def test_inspect_and_the_card_follow(run: Run, folder_of: FolderOf, text_file: Path, tmp_path: Path) -> None:
    folder = with_head(folder_of(state_size=32, head_dim=64, num_heads=1))
    code, out, _ = run("inspect", folder, "--json")
    found = json.loads(out)
    assert (code, found["tied_head"]) == (0, False)
    assert found["parameters"] == sum(value.numel() for value in load_file(folder / "model.safetensors").values())
    assert "--untie" not in out
    windows = ["--calibration", text_file, "--windows", 2, "--window-length", 32, "--refit", 0]
    code, _, err = run("prune", folder, "--state-size", 16, "--untie", "--output", tmp_path / "out", *windows)
    assert code == 0, err
    assert "--untie" not in (tmp_path / "out" / "README.md").read_text()
    code, _, err = run("export", folder, "--format", "transformers", "--untie", "--output", tmp_path / "untied")
    assert code == 0, err
    assert config_of(tmp_path / "untied")["tie_word_embeddings"] is False


def test_where_other_weights_are_shared_as_well(tmp_path: Path) -> None:
    """transformers has one switch for Zamba2's shared blocks and its head, and unties the head by its values."""
    tiny_hybrid("zamba2").save_pretrained(tmp_path / "model")
    folder = with_head(tmp_path / "model", embeddings="model.embed_tokens.weight")
    checkpoint = ghostssm.load(str(folder))
    assert not ghostssm.describe(str(folder)).tied_head
    written = ghostssm.export_checkpoint(checkpoint, tmp_path / "out", untie=True)
    assert config_of(written)["tie_word_embeddings"] is True
    for read in (ghostssm.load(str(written)).model, ghostssm.stream(str(written)).model):
        assert torch.equal(read.lm_head.weight, read.model.embed_tokens.weight * 2)
