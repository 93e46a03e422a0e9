"""What is told of a model without its weights: the same from the headers of its files as from a model that is built."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

import ghostssm
from ghostssm.checkpoint import description
from ghostssm.checkpoint.loading import model_config
from ghostssm.checkpoint.source import find_source
from ghostssm.models.families import family_of
from tests.conftest import random_windows, tiny_model
from tests.families.tiny import CASES, tiny_hybrid


def check_facts(folder: Path, plain: bool = True) -> description.Facts | None:
    """What the headers tell is what the model has."""
    source = find_source(str(folder))
    config = model_config(source)
    found = description.facts_from_files(source, config, family_of(config))
    assert (found is not None) == plain
    if found is not None:
        assert found == description._facts_of(description._built(source, config))
    return found


@pytest.mark.parametrize("case", CASES)
def test_headers_tell_what_a_model_has(case: str, tmp_path: Path) -> None:
    tiny_hybrid(case).save_pretrained(tmp_path)
    check_facts(tmp_path, plain=not case.startswith("zamba2"))


@pytest.mark.parametrize("recipe", ["balanced", "ghost+per-layer"])
def test_of_our_own_class(recipe: str, tmp_path: Path) -> None:
    model = tiny_model()
    plan = ghostssm.Calibration(model, random_windows(4, 32)).plan(recipe, 8, multiple=2)
    ghostssm.apply_plan(model, plan).save_pretrained(tmp_path)
    found = check_facts(tmp_path)
    assert found is not None
    assert sum(found.state_sizes) == 24


@pytest.mark.parametrize("equal", [True, False])
def test_a_head_that_is_stored_and_tied(equal: bool, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    head = tensors["backbone.embeddings.weight"].clone()
    safetensors.torch.save_file(tensors | {"lm_head.weight": head + (not equal)}, file, {"format": "pt"})
    found = check_facts(tmp_path)
    assert found is not None
    assert found.tied_head == equal


def test_the_mamba_ssm_dialect(folder_of: Callable[..., Path], tmp_path: Path) -> None:
    source = ghostssm.load(str(folder_of()))
    check_facts(ghostssm.export_checkpoint(source, tmp_path / "theirs", dialect="mamba_ssm"))


def cut_conv(tensors: dict[str, Any]) -> None:
    name = "backbone.layers.1.mixer.conv1d.weight"
    tensors[name] = tensors[name][:-1].contiguous()


def drop_layer(tensors: dict[str, Any]) -> None:
    for name in [name for name in tensors if ".layers.2." in name]:
        del tensors[name]


@pytest.mark.parametrize("break_it", [cut_conv, drop_layer])
def test_files_with_other_sizes_are_left_to_whoever_builds_the_model(
    break_it: Callable[[dict[str, Any]], None], tmp_path: Path
) -> None:
    tiny_model().save_pretrained(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    break_it(tensors)
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    check_facts(tmp_path, plain=False)
    assert ghostssm.describe(str(tmp_path)).layers == 3


def test_a_description_imports_no_model_class(folder_of: Callable[..., Path]) -> None:
    script = (
        "import sys, ghostssm\n"
        f"found = ghostssm.describe({str(folder_of())!r})\n"
        "assert not {'transformers.modeling_utils', 'torch._dynamo'} & set(sys.modules)\n"
        "print(found.layers, found.parameters)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    parameters = sum(parameter.numel() for parameter in tiny_model().parameters())
    assert done.stdout.split() == ["3", str(parameters)], done.stderr


def test_no_file_of_weights(tmp_path: Path) -> None:
    tiny_model().config.save_pretrained(tmp_path)
    found = ghostssm.describe(str(tmp_path))
    assert (found.layers, found.tied_head) == (3, True)
