"""config.json as published checkpoints have it: engines know those names only, and transformers reads them alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ghostssm.checkpoint.saving import write_config
from tests.families.tiny import CASES, tiny_hybrid


def written(model: PreTrainedModel, folder: Path) -> dict[str, Any]:
    write_config(model, folder)
    found: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return found


PUBLISHED: dict[str, dict[str, Any]] = {
    "codestral-mamba": {"intermediate_size": 64, "rms_norm": True},
    "bamba": {"attn_layer_indices": [1], "attn_rotary_emb": 4, "rope_theta": 10000.0, "rope_scaling": None},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 3, "rope_theta": 10000.0},
    "falcon_h1": {"head_dim": 8, "rope_theta": 10000.0, "rope_scaling": None},
    "granite": {
        "layer_types": ["mamba", "attention", "mamba", "mamba"],
        "position_embedding_type": "rope",
        "rope_theta": 10000.0,
        "intermediate_size": 48,
    },
    # Without experts one MLP is left, whose width engines read under two names.
    "granite-dense": {
        "layer_types": ["mamba", "attention", "mamba"],
        "position_embedding_type": "nope",
        "intermediate_size": 24,
        "shared_intermediate_size": 24,
    },
    "nemotron_h": {
        "layers_block_type": ["mamba", "mlp", "attention", "mamba", "moe", "mamba"],
        "mtp_layers_block_type": ["attention", "moe"],
        "hybrid_override_pattern": "M-*MEM",
        "num_hidden_layers": 6,
        "n_groups": 4,
        "mamba_n_groups": 4,
        "num_experts_per_tok": 2,
    },
}


@pytest.mark.parametrize("case", PUBLISHED)
def test_keys_are_those_of_published_checkpoints(case: str, tmp_path: Path) -> None:
    found = written(tiny_hybrid(case), tmp_path)
    assert {key: found.get(key, "absent") for key in PUBLISHED[case]} == PUBLISHED[case]


@pytest.mark.parametrize("case", CASES)
def test_transformers_reads_the_same_model(case: str, tmp_path: Path) -> None:
    model = tiny_hybrid(case)
    model.save_pretrained(tmp_path)
    plain = AutoConfig.from_pretrained(tmp_path).to_dict()
    write_config(model, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    added = {key: value for key, value in again.config.to_dict().items() if plain.get(key, "absent") != value}
    # Keys that transformers keeps without using them, or works out again.
    unused = {"head_dim", "rms_norm", "attn_rotary_emb", "position_embedding_type", "intermediate_size"}
    assert added.keys() <= unused | {"num_hidden_layers", "hybrid_override_pattern", "mamba_proj_bias"}
    ids = torch.arange(1, 30)[None]
    with torch.inference_mode():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=0)


def test_a_nemotron_without_experts_names_none(tmp_path: Path) -> None:
    """llama.cpp's converter takes a config with such a key for one with experts, and finds no MLP in it."""
    model = tiny_hybrid("nemotron_h", layers_block_type=["mamba", "mlp", "attention"], use_bias=True)
    found = written(model, tmp_path)
    assert not [key for key in found if "expert" in key or key.startswith("moe_")]
    assert found["mamba_proj_bias"] is True
    assert AutoConfig.from_pretrained(tmp_path).to_dict()["layers_block_type"] == model.config.layers_block_type


def test_rotary_scaling_is_there_under_both_names(tmp_path: Path) -> None:
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}
    found = written(tiny_hybrid("falcon_h1", rope_parameters=scaled), tmp_path)
    assert (found["rope_theta"], found["rope_scaling"], found["rope_parameters"]) == (5000.0, scaled, scaled)
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == scaled


def test_a_config_that_was_read_in_its_published_form_is_written_in_it(tmp_path: Path) -> None:
    model = tiny_hybrid("granite")
    written(model, tmp_path)
    first = (tmp_path / "config.json").read_text(encoding="utf-8")
    again = transformers.GraniteMoeHybridForCausalLM(AutoConfig.from_pretrained(tmp_path))
    write_config(again, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8")) == json.loads(first)
