"""Broken checkpoints: each a clear message, nothing loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import ghostssm
from ghostssm.errors import ModelError, NumericalError
from tests.checkpoint.test_round_trip import mamba_ssm_folder
from tests.conftest import tiny_model

FolderOf = Callable[..., Path]


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "'llama'.*no Mamba-2 layers.*expected one of: bamba, .*mamba2, .*zamba2"),
        ({"model_type": "mamba"}, "Mamba-1"),
        ({"model_type": "falcon_mamba"}, r"Mamba-1 \(FalconMamba\)"),
        ({"model_type": "jamba"}, r"Mamba-1 \(Jamba\)"),
        ({"model_type": "zamba"}, r"Mamba-1 \(Zamba\)"),
        ({"model_type": "mamba3"}, "Mamba-3"),
        ({"model_type": None}, "neither a model_type nor an ssm_cfg"),
        ({"num_heads": 7}, "num_heads"),
        ({"n_groups": 3}, "n_groups = 3 does not divide"),
        ({"state_size": 0}, "state_size is 0"),
        ({"state_size": "16"}, "state_size"),
        ({"hidden_act": "gelu"}, "activation of backbone.layers.0.mixer is 'gelu'"),
        ({"quantization_config": {"bits": 4, "quant_method": "gptq"}}, "gptq.*Prune or distil the unquantised model"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes"),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
    ],
)
def test_configs(folder_of: FolderOf, changes: dict[str, Any], message: str) -> None:
    folder = folder_of()
    edit_config(folder, **changes)
    with pytest.raises(ghostssm.InputError, match=message):
        ghostssm.load(str(folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ssm_cfg": {}}, "Mamba1 model"),
        ({"ssm_cfg": {"layer": "Mamba3"}}, "Mamba3 model"),
        ({"ssm_cfg": 3}, "ssm_cfg"),
        ({"attn_layer_idx": [1]}, "attention layers"),
        ({"rms_norm": False}, "rms_norm"),
        ({"ssm_cfg": {"layer": "Mamba2", "d_ssm": 64}}, "d_ssm"),
        ({"ssm_cfg": {"layer": "Mamba2", "new_option": 1}}, "new_option is not a known key"),
        ({"surprise": 1}, "surprise is not a known key"),
        ({"ssm_cfg": {"layer": "Mamba2", "headdim": 0}}, "headdim is 0"),
    ],
)
def test_mamba_ssm_configs(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = mamba_ssm_folder(tmp_path, None, **changes)
    with pytest.raises(ModelError, match=message):
        ghostssm.load(str(folder))


def test_a_shape_that_contradicts_the_config_names_tensor_and_both_shapes(folder_of: FolderOf) -> None:
    folder = folder_of()
    edit_config(folder, state_size=8)
    with pytest.raises(ModelError) as caught:
        ghostssm.load(str(folder))
    message = str(caught.value)
    assert "backbone.layers.0.mixer.conv1d.weight has shape (96, 1, 4)" in message
    assert "implies (80, 1, 4)" in message


def test_missing_and_surplus_tensors_are_named(folder_of: FolderOf) -> None:
    folder = folder_of()

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["backbone.layers.9.mixer.D"] = tensors.pop("backbone.layers.1.mixer.D")

    edit_weights(folder, change)
    with pytest.raises(ModelError) as caught:
        ghostssm.load(str(folder))
    assert "backbone.layers.1.mixer.D (8,) is missing" in str(caught.value)
    assert "backbone.layers.9.mixer.D (8,) belongs to no part" in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(folder_of: FolderOf, value: float) -> None:
    folder = folder_of()

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["backbone.layers.2.mixer.A_log"][3] = value

    edit_weights(folder, change)
    with pytest.raises(NumericalError, match=r"layers\.2\.mixer\.A_log"):
        ghostssm.load(str(folder))


@pytest.mark.parametrize("keep", [0, 4, 100, 20000])
def test_truncated_safetensors(folder_of: FolderOf, keep: int) -> None:
    path = folder_of() / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"model\.safetensors is truncated"):
        ghostssm.load(str(path.parent))


@pytest.mark.parametrize("keep", [0, 100, 20000])
def test_truncated_pickle(tmp_path: Path, keep: int) -> None:
    path = mamba_ssm_folder(tmp_path, None) / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"pytorch_model\.bin is truncated"):
        ghostssm.load(str(path.parent))


def test_a_pickle_that_runs_code_is_not_run(tmp_path: Path) -> None:
    folder = mamba_ssm_folder(tmp_path, None)

    class Runs:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"backbone.embedding.weight": Runs()}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError):
        ghostssm.load(str(folder))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "value", "stored_as"),
    [
        ("weight", torch.zeros(168, 32, dtype=torch.int8), "I8|int8"),
        ("weight", torch.zeros(168, 32, dtype=torch.float8_e4m3fn), "F8_E4M3|float8_e4m3fn"),
        ("qweight", torch.zeros(4, 168, dtype=torch.int32), "I32|int32"),
        ("weight_scale_inv", torch.ones(2, 1), "F32|float32"),
        ("SCB", torch.ones(168), "F32|float32"),
    ],
)
@pytest.mark.parametrize("pickled", [False, True])
def test_quantised_weights(folder_of: FolderOf, name: str, value: torch.Tensor, stored_as: str, pickled: bool) -> None:
    """Without a quantization_config: by what is stored."""
    folder = folder_of()

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"backbone.layers.0.mixer.in_proj.{name}"] = value

    edit_weights(folder, change)
    if pickled:
        whole = folder / "model.safetensors"
        torch.save(safetensors.torch.load_file(whole), folder / "pytorch_model.bin")
        whole.unlink()
    with pytest.raises(ModelError, match=rf"in_proj\.{name} in .* is stored as .*({stored_as}).*then quantise"):
        ghostssm.load(str(folder))


def test_a_shared_tensor_may_be_stored_once_but_not_left_out(folder_of: FolderOf) -> None:
    folder = folder_of()
    edit_weights(folder, lambda tensors: tensors.update({"lm_head.weight": tensors.pop("backbone.embeddings.weight")}))
    assert torch.equal(ghostssm.load(str(folder)).model.lm_head.weight, tiny_model().lm_head.weight)
    edit_weights(folder, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ModelError, match=r"embeddings\.weight \(288, 32\) is missing"):
        ghostssm.load(str(folder))


def test_missing_files(folder_of: FolderOf, tmp_path: Path) -> None:
    folder = folder_of()
    (folder / "model.safetensors").rename(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match="holds no weights"):
        ghostssm.load(str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match="JSON"):
        ghostssm.load(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config\.json"):
        ghostssm.load(str(folder))
    with pytest.raises(ModelError, match="There is no folder"):
        ghostssm.load(str(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match="is a file"):
        ghostssm.load(str(tmp_path / "elsewhere"))


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "missing.safetensors"])
def test_an_index_that_points_elsewhere(folder_of: FolderOf, name: str) -> None:
    folder = folder_of()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"plain names of \.safetensors files|missing weight files"):
        ghostssm.load(str(folder))


def test_a_missing_tokenizer_is_an_error_only_where_text_is_needed(folder_of: FolderOf) -> None:
    folder = folder_of()
    for path in folder.glob("tokenizer*"):
        path.unlink()
    checkpoint = ghostssm.load(str(folder))
    with pytest.raises(ModelError, match="--tokenizer"):
        checkpoint.require_tokenizer()


def test_a_tokenizer_larger_than_the_vocabulary(folder_of: FolderOf) -> None:
    with pytest.raises(ModelError, match="257 tokens, the model only 100"):
        ghostssm.load(str(folder_of(vocab_size=100)))


def test_an_unreachable_hub_says_what_to_bring(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"config\.json.*weights.*tokenizer\.json"):
        ghostssm.load("nobody/no-such-model")
