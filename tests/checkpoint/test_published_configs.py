"""Configs as they are published: with keys of both dialects, with whole numbers for floats, in another format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ghostssm
from ghostssm.checkpoint.dialects.mamba_ssm import CONFIG_KEYS
from ghostssm.errors import ModelError
from tests.checkpoint.test_bad_checkpoints import FolderOf, edit_config
from tests.checkpoint.test_round_trip import THEIR_SIZES, mamba_ssm_folder, pruned_checkpoint
from tests.conftest import Run, tiny_model
from tests.families.tiny import tiny_hybrid

IDS = torch.arange(1, 30)[None]
OF_THE_HUB = {
    "architectures": ["MambaLMHeadModel"],
    "model_type": "mamba2",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0",
    "eos_token_id": 0,
    "use_cache": True,
    "tie_word_embeddings": True,
}


def logits(folder: Path) -> Tensor:
    with torch.no_grad():
        found: Tensor = ghostssm.load(str(folder)).model(IDS).logits
    return found


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def test_keys_of_the_hub_in_a_mamba_ssm_config(tmp_path: Path) -> None:
    expected = tiny_model(**THEIR_SIZES)(IDS).logits
    folder = mamba_ssm_folder(tmp_path, None, **OF_THE_HUB)
    assert torch.equal(logits(folder), expected)
    assert ghostssm.find_source(str(folder)).dialect == "mamba_ssm"
    checkpoint, plan = pruned_checkpoint(folder)
    written = ghostssm.save(checkpoint, plan, tmp_path / "out", dialect="mamba_ssm")
    assert config_of(written).keys() <= CONFIG_KEYS  # mamba_ssm rejects all others


def test_a_config_with_the_sizes_of_both_dialects_goes_by_the_names_of_the_weights(
    folder_of: FolderOf, tmp_path: Path
) -> None:
    theirs = mamba_ssm_folder(tmp_path, None)
    ours = folder_of(**THEIR_SIZES)
    both = config_of(ours) | config_of(theirs)
    for folder, dialect in ((theirs, "mamba_ssm"), (ours, "transformers")):
        edit_config(folder, **both | {"vocab_size": config_of(folder)["vocab_size"]})
        assert ghostssm.find_source(str(folder)).dialect == dialect
    assert torch.equal(logits(theirs), logits(ours))
    checkpoint, plan = pruned_checkpoint(ours)
    written = config_of(ghostssm.save(checkpoint, plan, tmp_path / "out"))
    assert not {"ssm_cfg", "d_model"} & written.keys()
    assert ghostssm.describe(str(tmp_path / "out")).layout.state_size == 5


def test_an_ssm_cfg_that_a_conversion_left_behind(folder_of: FolderOf) -> None:
    folder = folder_of()
    expected = logits(folder)
    edit_config(folder, ssm_cfg={"layer": "Mamba2", "d_state": 128})
    assert torch.equal(logits(folder), expected)


def test_whole_numbers_for_the_limits_of_dt(folder_of: FolderOf, tmp_path: Path) -> None:
    ours = folder_of(time_step_limit=(0.0, 1.0), **THEIR_SIZES)
    expected = logits(ours)
    edit_config(ours, time_step_limit=[0, 1])
    assert torch.equal(logits(ours), expected)
    size = {"layer": "Mamba2", "d_state": 16, "headdim": 8}
    assert torch.equal(logits(mamba_ssm_folder(tmp_path, None, ssm_cfg={**size, "dt_limit": [0, 1]})), expected)


@pytest.mark.parametrize("nested", [False, True])
def test_a_rope_theta_beyond_31_bits(tmp_path: Path, nested: bool) -> None:
    tiny_hybrid("falcon_h1", rope_parameters={"rope_theta": 1e11, "rope_type": "default"}).save_pretrained(tmp_path)
    expected = logits(tmp_path)
    theta = {"rope_theta": 100_000_000_000}
    config = {key: value for key, value in config_of(tmp_path).items() if key != "rope_parameters"}
    (tmp_path / "config.json").write_text(json.dumps(config | ({"rope_parameters": theta} if nested else theta)))
    assert torch.equal(logits(tmp_path), expected)


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("falcon_h1", {"key_multiplier": 1, "ssm_multipliers": [1, 1, 1, 1, 1], "mlp_multipliers": [1, 2]}),
        ("bamba", {"z_loss_coefficient": 0}),
        ("nemotron_h", {"time_step_max": 1}),
    ],
)
def test_whole_numbers_for_other_floats(tmp_path: Path, case: str, changes: dict[str, Any]) -> None:
    tiny_hybrid(case).save_pretrained(tmp_path)
    edit_config(tmp_path, **json.loads(json.dumps(changes), parse_int=float))
    expected = logits(tmp_path)
    edit_config(tmp_path, **changes)
    assert torch.equal(logits(tmp_path), expected)


@pytest.mark.parametrize("size", [10**11, 10**400])
def test_sizes_stay_bounded(folder_of: FolderOf, size: int) -> None:
    for key in ("vocab_size", "layer_norm_epsilon") if size > 2**63 else ("vocab_size",):
        folder = folder_of(key)
        edit_config(folder, **{key: size})
        with pytest.raises(ModelError, match=f"{key} has {len(str(size))} digits"):
            ghostssm.load(str(folder))


@pytest.mark.parametrize(("case", "key"), [("mamba2", "chunk_size"), ("bamba", "mamba_chunk_size")])
@pytest.mark.parametrize("verb", ["inspect", "verify"])
def test_a_chunk_of_no_tokens(run: Run, tmp_path: Path, case: str, key: str, verb: str) -> None:
    model = tiny_model() if case == "mamba2" else tiny_hybrid(case)
    model.save_pretrained(tmp_path)
    edit_config(tmp_path, **{key: 0})
    if verb == "verify":
        (tmp_path / "ghostssm.json").write_text("{}")
    code, out, err = run(verb, tmp_path)
    assert code == (2 if verb == "inspect" else 1)
    assert f"{key} is 0, expected a positive integer such as 256" in " ".join((out + err).split())


@pytest.mark.parametrize("with_config", [False, True])
def test_the_format_of_mistral_is_named(folder_of: FolderOf, with_config: bool) -> None:
    folder = folder_of()
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    (folder / "params.json").write_text("{}")
    if not with_config:
        (folder / "config.json").unlink()
    for read in (ghostssm.load, ghostssm.stream):
        with pytest.raises(ModelError, match=r"Mistral's own format.*--revision refs/pr/9.*or convert"):
            read(str(folder))


def test_consolidated_weights_beside_those_that_are_read_do_not_matter(folder_of: FolderOf) -> None:
    folder = folder_of()
    expected = logits(folder)
    (folder / "consolidated.safetensors").write_bytes(b"not read")
    (folder / "params.json").write_text("{}")
    assert torch.equal(logits(folder), expected)
