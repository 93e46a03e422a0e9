"""Names that published files have, against what transformers' own loader makes of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import ghostssm
from ghostssm.checkpoint.loading import empty_model
from ghostssm.errors import ModelError
from tests.checkpoint.test_round_trip import mamba_ssm_folder
from tests.conftest import random_windows, tiny_model
from tests.families.tiny import CASES, tiny_hybrid

IDS = torch.arange(1, 25)[None]
Tensors = dict[str, Tensor]


def model_of(case: str) -> PreTrainedModel:
    return tiny_model() if case == "mamba2" else tiny_hybrid(case)


def renamed(folder: Path, case: str, rename: Callable[[Tensors], Tensors]) -> PreTrainedModel:
    """Save a model with other names for its tensors."""
    model = model_of(case)
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    safetensors.torch.save_file(rename(safetensors.torch.load_file(file)), file, metadata={"format": "pt"})
    return model


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def without_prefix(tensors: Tensors) -> Tensors:
    return {name.removeprefix("backbone.").removeprefix("model."): value for name, value in tensors.items()}


def under_model(tensors: Tensors) -> Tensors:
    """Nemotron-H's experts stay one by one."""
    return {name.replace("backbone.", "model.", 1): value for name, value in tensors.items()}


def with_rotary_buffers(tensors: Tensors) -> Tensors:
    """As transformers wrote them into every attention layer once."""
    return tensors | {f"model.layers.{index}.self_attn.rotary_emb.inv_freq": torch.zeros(4) for index in range(3)}


SPELLINGS = [
    *((case, without_prefix) for case in ("mamba2", "bamba", "zamba2", "falcon_h1", "granite", "nemotron_h")),
    ("nemotron_h", under_model),
    *((case, with_rotary_buffers) for case in ("bamba", "zamba2", "falcon_h1", "granite")),
]


@pytest.mark.parametrize(("case", "rename"), SPELLINGS)
def test_names_that_transformers_reads_exactly(tmp_path: Path, case: str, rename: Callable[[Tensors], Tensors]) -> None:
    expected = logits(renamed(tmp_path, case, rename))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected)
    assert torch.equal(logits(ghostssm.load(str(tmp_path)).model), expected)


@pytest.mark.parametrize(("case", "rename"), [("mamba2", without_prefix), ("nemotron_h", under_model)])
def test_both_roads_read_and_write_the_same(tmp_path: Path, case: str, rename: Callable[[Tensors], Tensors]) -> None:
    folder, windows = tmp_path / "model", random_windows(2, 24)
    renamed(folder, case, rename)
    checkpoint = ghostssm.load(str(folder))
    plan = ghostssm.Calibration(checkpoint.model, windows).plan("ghost", 8)
    ghostssm.apply_plan(checkpoint.model, plan)
    ghostssm.save(checkpoint, plan, tmp_path / "loaded")
    ghostssm.prune_streamed(ghostssm.stream(str(folder), head=False), windows, "ghost", 8, tmp_path / "streamed")
    found = [
        {
            name: value
            for file in place.glob("*.safetensors")
            for name, value in safetensors.torch.load_file(file).items()
        }
        for place in (tmp_path / "loaded", tmp_path / "streamed")
    ]
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    for place in ("loaded", "streamed"):
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / place)), logits(checkpoint.model))


def test_mamba_ssm_names_without_a_prefix(tmp_path: Path) -> None:
    folder = mamba_ssm_folder(tmp_path, None)
    expected = logits(ghostssm.load(str(folder)).model)
    torch.save(without_prefix(torch.load(folder / "pytorch_model.bin")), folder / "pytorch_model.bin")
    assert torch.equal(logits(ghostssm.load(str(folder)).model), expected)


def another_prefix(tensors: Tensors) -> Tensors:
    return {f"transformer.{name.split('.', 1)[1]}": value for name, value in tensors.items()}


@pytest.mark.parametrize("case", ["mamba2", *CASES])
def test_a_prefix_that_transformers_does_not_know_is_refused(tmp_path: Path, case: str) -> None:
    """It would fill the whole model with random numbers."""
    renamed(tmp_path, case, another_prefix)
    for read in (ghostssm.load, ghostssm.stream):
        with pytest.raises(ModelError, match=r"is missing(.|\n)*and \d+ more(.|\n)*correct config\.json"):
            read(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, name: tensors.pop(name), r"experts\.2\.up_proj\.weight \(24, 32\) is missing"),
        (lambda tensors, name: tensors.update({name: torch.zeros(23, 32)}), r"experts\.2\.up_proj\.weight has shape"),
        (
            lambda tensors, name: tensors.update({name.replace(".2.", ".4."): tensors[name].clone()}),
            r"experts\.4\.up_proj\.weight \(24, 32\) belongs to no part",
        ),
        (
            lambda tensors, name: tensors.update({name.replace("backbone.", "", 1): tensors[name].clone()}),
            r"\.2\.up_proj\.weight is the same part of the model as .*\.2\.up_proj\.weight",
        ),
    ],
)
def test_one_of_many_experts(tmp_path: Path, change: Callable[[Tensors, str], object], message: str) -> None:
    def changed(tensors: Tensors) -> Tensors:
        change(tensors, "backbone.layers.4.mixer.experts.2.up_proj.weight")
        return tensors

    renamed(tmp_path, "nemotron_h", changed)
    with pytest.raises(ModelError, match=message):
        ghostssm.load(str(tmp_path))


def test_a_rotary_buffer_in_a_model_that_has_none_is_refused(tmp_path: Path) -> None:
    model = renamed(tmp_path, "mamba2", with_rotary_buffers)
    assert not any("rotary" in name for name, _ in empty_model(model.config).named_buffers())
    with pytest.raises(ModelError, match=r"inv_freq \(4,\) belongs to no part"):
        ghostssm.load(str(tmp_path))
