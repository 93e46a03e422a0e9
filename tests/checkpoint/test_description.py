"""What is told of a model without its weights: the same from the headers of its files as from a model that is built."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from transformers import PreTrainedModel

import ghostssm
from ghostssm.checkpoint import description
from ghostssm.checkpoint.loading import model_config
from ghostssm.checkpoint.source import find_source
from ghostssm.models.families import family_of, mixers_of
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
    check_facts(tmp_path)


@pytest.mark.parametrize("equal", [True, False])
def test_blocks_that_layers_share_and_files_repeat(equal: bool, tmp_path: Path) -> None:
    """Values of their own are weights of their own, as transformers loads them."""
    tiny_hybrid("zamba2").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    shared = {name: value for name, value in tensors.items() if ".1.shared_transformer." in name}
    repeated = {name.replace("layers.1.", "layers.5."): value + (not equal) for name, value in shared.items()}
    assert shared
    assert not repeated.keys() & tensors.keys()
    safetensors.torch.save_file(tensors | repeated, file, {"format": "pt"})
    loaded = ghostssm.load(str(tmp_path)).model
    found = description.describe(str(tmp_path))
    assert found.parameters == sum(parameter.numel() for parameter in loaded.parameters())
    assert found.tied_head


def test_layers_that_predict_further_tokens_are_not_counted(tmp_path: Path) -> None:
    """transformers leaves them in the files, with whatever is in them."""
    tiny_hybrid("nemotron_h").save_pretrained(tmp_path)
    expected = check_facts(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    further = {f"mtp.layers.0.{name.rpartition('layers.0.')[2]}": value.clone() for name, value in tensors.items()}
    safetensors.torch.save_file(tensors | further, file, {"format": "pt"})
    assert any(name.endswith("A_log") for name in further)
    assert check_facts(tmp_path) == expected


@pytest.mark.parametrize("recipe", ["balanced", "ghost+per-layer"])
@pytest.mark.parametrize("made", [tiny_model, partial(tiny_hybrid, "zamba2")])
def test_of_our_own_class(recipe: str, made: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    model = made()
    plan = ghostssm.Calibration(model, random_windows(4, 32)).plan(recipe, 8, multiple=2)
    ghostssm.apply_plan(model, plan).save_pretrained(tmp_path)
    found = check_facts(tmp_path)
    assert found is not None
    assert sum(found.state_sizes) == 8 * len(found.state_sizes)


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


@pytest.mark.parametrize("made", [tiny_model, partial(tiny_hybrid, "zamba2")])
def test_a_description_imports_no_model_class(made: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    model = made()
    model.save_pretrained(tmp_path)
    script = (
        "import sys, ghostssm\n"
        f"found = ghostssm.describe({str(tmp_path)!r})\n"
        "assert not {'transformers.modeling_utils', 'torch._dynamo'} & set(sys.modules)\n"
        "print(found.layers, found.parameters)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert done.stdout.split() == [str(len(mixers_of(model))), str(parameters)], done.stderr


def test_no_file_of_weights(tmp_path: Path) -> None:
    tiny_model().config.save_pretrained(tmp_path)
    found = ghostssm.describe(str(tmp_path))
    assert (found.layers, found.tied_head) == (3, True)
