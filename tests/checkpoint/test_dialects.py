"""Dialects are objects: one more takes a class and one registration, and nothing else knows their names."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import PreTrainedModel

import ghostssm
from ghostssm.checkpoint.dialects import base, dialect_named, register
from ghostssm.checkpoint.dialects.transformers import Transformers
from ghostssm.errors import InputError
from tests.checkpoint.test_round_trip import pruned_checkpoint

RENAMED = {"width": "hidden_size", "states": "state_size"}


class Toy(Transformers):
    """transformers' with two keys renamed, in capital letters, and everything in one file."""

    name, library = "toy", "toys"
    ties_heads = has_shards = keeps_unread = holds_own_class = False
    translated_keys = RENAMED

    def recognises(self, config: Mapping[str, Any], folder: Path) -> bool:
        return "width" in config

    def to_transformers(self, config: dict[str, Any], where: str) -> dict[str, Any]:
        return super().to_transformers({RENAMED.get(key, key): value for key, value in config.items()}, where)

    def from_transformers(
        self, model: PreTrainedModel, base: Mapping[str, Any] | None, carried: bool
    ) -> dict[str, Any]:
        names = {ours: theirs for theirs, ours in RENAMED.items()}
        written = super().from_transformers(model, base, carried)
        return {names.get(key, key): value for key, value in written.items()} | {"from_toy": base is not None}

    def to_transformers_name(self, name: str) -> str:
        return name.removeprefix("toy.")

    def write_weights(self, model: PreTrainedModel, folder: Path) -> None:
        tensors = {f"toy.{name}": value.clone() for name, value in model.state_dict().items()}
        safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    def how_to_load(self, own_class: bool) -> str:
        return "Wind it up."


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_DIALECTS", dict(base._DIALECTS))
    register(Toy())


@pytest.mark.usefixtures("toy")
def test_a_further_dialect_is_written_found_and_loaded(folder_of: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint, plan = pruned_checkpoint(folder_of())
    written = ghostssm.save(checkpoint, plan, tmp_path / "toys", dialect="toy")
    config = json.loads((written / "config.json").read_text())
    assert (config["states"], config["from_toy"]) == (5, False)
    assert not RENAMED.values() & config.keys()
    card = (written / "README.md").read_text()
    assert "library_name: toys" in card
    assert "Wind it up." in card
    manifest = json.loads((written / "ghostssm.json").read_text())
    assert manifest["dialect"] == "toy"
    assert manifest["left_out"] == {"tensors": [], "config_keys": [], "zeroed": []}
    assert ghostssm.verify(written).passed
    assert ghostssm.describe(str(written)).dialect == "toy"
    read = ghostssm.load(str(written))
    for name, value in checkpoint.model.state_dict().items():
        assert torch.equal(read.model.state_dict()[name], value)
    again = ghostssm.export_checkpoint(read, tmp_path / "again", dialect="toy")
    assert json.loads((again / "config.json").read_text())["from_toy"]
    ours = ghostssm.export_checkpoint(read, tmp_path / "ours", dialect="transformers")
    assert ghostssm.describe(str(ours)).dialect == "transformers"


@pytest.mark.usefixtures("toy")
def test_what_a_dialect_does_not_hold_is_refused(folder_of: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint, plan = pruned_checkpoint(folder_of())
    with pytest.raises(InputError, match=r"the toy dialect always stores lm_head\.weight"):
        ghostssm.save(checkpoint, plan, tmp_path / "out", dialect="toy", untie=True)
    assert not (tmp_path / "out").exists()


def test_a_dialect_that_is_not_there(folder_of: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint, plan = pruned_checkpoint(folder_of())
    with pytest.raises(InputError, match="No dialect is called 'toy'; expected one of: transformers, mamba_ssm"):
        ghostssm.save(checkpoint, plan, tmp_path / "out", dialect="toy")
    with pytest.raises(InputError, match="No dialect is called 'gguf'"):
        ghostssm.export_checkpoint(checkpoint, tmp_path / "out", dialect="gguf")
    assert not (tmp_path / "out").exists()
    assert dialect_named("mamba_ssm").name == "mamba_ssm"
