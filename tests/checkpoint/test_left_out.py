"""What goes into a checkpoint and does not come out is carried over, or named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import ghostssm
from ghostssm.checkpoint import carried
from ghostssm.checkpoint.left_out import LeftOut
from ghostssm.checkpoint.weights import stored_tensors
from tests.conftest import Run, random_windows
from tests.engines.hybrids import hybrid_model
from tests.families.tiny import tiny_hybrid

FolderOf = Callable[..., Path]
COUNT, PATTERN = "num_nextn_predict_layers", "mtp_hybrid_override_pattern"
PREDICTION = {
    "mtp.layers.0.eh_proj.weight": torch.linspace(-1, 1, 32 * 64).view(32, 64),
    "mtp.layers.0.enorm.weight": torch.ones(32),
    "mtp.layers.1.mixer.experts.0.up_proj.weight": torch.full((24, 32), 0.5),
}


def json_of(folder: Path, name: str = "config.json") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / name).read_text())
    return found


def left_out_of(folder: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = json_of(folder, "ghostssm.json")["left_out"]
    return found


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor.read() for name, tensor in stored_tensors(folder).items()}


def predicting(folder: Path, tokenizer: PreTrainedTokenizerFast, extra: dict[str, Tensor] = PREDICTION) -> Path:
    """A Nemotron-H whose files have layers that predict further tokens, which transformers' class does not load."""
    tiny_hybrid("nemotron_h").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    file = folder / "model.safetensors"
    save_file(load_file(file) | extra, file, metadata={"format": "pt"})
    config = json_of(folder) | {COUNT: 1, PATTERN: "*E"}
    config.pop("mtp_layers_block_type")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def pruned(folder: Path, output: Path, road: str) -> Path:
    windows = random_windows(2, 40)
    if road == "streamed":
        ghostssm.prune_streamed(ghostssm.stream(str(folder), head=False), windows, "ghost", 4, output)
        return output
    checkpoint = ghostssm.load(str(folder))
    plan = ghostssm.Calibration(checkpoint.model, windows).plan("ghost", 4)
    ghostssm.apply_plan(checkpoint.model, plan)
    return ghostssm.save(checkpoint, plan, output)


@pytest.mark.parametrize("road", ["in memory", "streamed"])
def test_layers_that_transformers_does_not_load_are_carried_over(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, road: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(carried, "_SHARD_BYTES", 1 << 12)  # more than one shard
    folder = predicting(tmp_path / "model", tokenizer)
    written = pruned(folder, tmp_path / "out", road)
    found = tensors_of(written)
    for name, value in PREDICTION.items():
        assert torch.equal(found[name], value)
    assert set(found) == set(tensors_of(folder))
    assert {key: json_of(written)[key] for key in (COUNT, PATTERN)} == {COUNT: 1, PATTERN: "*E"}
    assert left_out_of(written) == {"tensors": [], "config_keys": [], "zeroed": []}
    assert ghostssm.verify(written).passed
    AutoModelForCausalLM.from_pretrained(written)  # warnings are errors
    again = ghostssm.export_checkpoint(ghostssm.load(str(written)), tmp_path / "again")
    assert set(tensors_of(again)) == set(found)


def test_exported_in_another_dtype(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    folder = predicting(tmp_path / "model", tokenizer, PREDICTION | {"mtp.bias": torch.ones(3, dtype=torch.float64)})
    checkpoint = ghostssm.load(str(folder), dtype=torch.bfloat16)
    found = tensors_of(ghostssm.export_checkpoint(checkpoint, tmp_path / "out"))
    assert {found[name].dtype for name in PREDICTION} == {torch.bfloat16}
    assert found["mtp.bias"].dtype == torch.float64  # as before, where it differs from the others


@pytest.mark.parametrize("road", ["in memory", "streamed"])
def test_mixers_of_another_state_size_are_left_out_and_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, road: str
) -> None:
    extra = PREDICTION | {"mtp.layers.2.mixer.A_log": torch.zeros(8)}
    folder = predicting(tmp_path / "model", tokenizer, extra)
    written = pruned(folder, tmp_path / "out", road)
    assert json_of(written)[COUNT] == 0
    assert not any(name.startswith("mtp") for name in tensors_of(written))
    found = left_out_of(written)
    assert (sorted(found["tensors"]), found["config_keys"], found["zeroed"]) == (sorted(extra), [], [COUNT])
    assert ghostssm.verify(written).passed
    # Of the same state size they go along.
    same = ghostssm.export_checkpoint(ghostssm.load(str(folder)), tmp_path / "same")
    assert set(extra) <= set(tensors_of(same))


def test_layers_that_are_counted_and_not_there(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """As transformers itself leaves them, whose class writes no such layers."""
    written = pruned(predicting(tmp_path / "model", tokenizer, {}), tmp_path / "out", "in memory")
    assert json_of(written)[COUNT] == 0
    assert left_out_of(written)["zeroed"] == [COUNT]


@pytest.mark.parametrize("road", [[], ["--stream"]])
def test_the_command_tells(
    run: Run, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, text_file: Path, road: list[str]
) -> None:
    folder = predicting(tmp_path / "model", tokenizer, PREDICTION | {"mtp.layers.2.mixer.A_log": torch.zeros(8)})
    config = json_of(folder) | {"auto_map": {"AutoConfig": "other.Config"}, "torch_dtype": "float32", "mine": 3}
    (folder / "config.json").write_text(json.dumps(config))
    options = ["--state-size", 4, "--calibration", text_file, "--windows", 2, "--window-length", 32, "--refit", 0]
    code, _, err = run("prune", folder, *options, *road, "--output", tmp_path / "out")
    assert code == 0, err
    assert "note: left out of the weights: mtp.layers.0.eh_proj.weight, " in err
    assert " and 1 more\n" in err
    assert "note: left out of the config: auto_map\n" in err
    assert f"note: {COUNT} is 0 in what is written" in err
    assert json_of(tmp_path / "out")["mine"] == 3
    code, out, _ = run("prune", folder, *options, *road, "--output", tmp_path / "out", "--overwrite", "--json")
    assert json.loads(out)["left_out"] == left_out_of(tmp_path / "out")
    assert left_out_of(tmp_path / "out")["config_keys"] == ["auto_map"]


def test_keys_without_a_place_in_mamba_ssm(run: Run, small: Path, tmp_path: Path) -> None:
    code, out, err = run("export", small, "--format", "mamba_ssm", "--output", tmp_path / "theirs")
    assert code == 0
    assert "note: left out of the config: bos_token_id, eos_token_id" in err
    code, out, _ = run("export", tmp_path / "theirs", "--format", "mamba_ssm", "--output", tmp_path / "again", "--json")
    assert json.loads(out)["left_out"] == {"tensors": [], "config_keys": [], "zeroed": []}
    config = json_of(tmp_path / "theirs")
    config["ssm_cfg"]["dt_min"] = 0.001
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config))
    code, out, _ = run("export", tmp_path / "theirs", "--format", "transformers", "--output", tmp_path / "o", "--json")
    assert json.loads(out)["left_out"]["config_keys"] == ["fused_add_norm", "ssm_cfg.dt_min"]


def test_what_an_export_leaves_out_is_added_to_the_manifest(folder_of: FolderOf, tmp_path: Path) -> None:
    folder = folder_of()
    (folder / "config.json").write_text(json.dumps(json_of(folder) | {"auto_map": {}}))
    written = pruned(folder, tmp_path / "out", "in memory")
    assert left_out_of(written)["config_keys"] == ["auto_map"]
    theirs = ghostssm.export_checkpoint(ghostssm.load(str(written)), tmp_path / "theirs", dialect="mamba_ssm")
    assert {"auto_map", "eos_token_id"} < set(left_out_of(theirs)["config_keys"])
    assert not {"hidden_size", "num_heads", "time_step_limit"} & set(left_out_of(theirs)["config_keys"])


def test_gguf_names_what_it_has_no_place_for(run: Run, small: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="needs gguf: pip install 'ghostssm[gguf]'")
    code, out, _ = run("export", small, "--output", tmp_path / "model.gguf", "--json")
    keys = set(json.loads(out)["left_out"]["config_keys"])
    assert {"initializer_range", "chunk_size"} < keys
    assert not keys & {"hidden_size", "state_size", "num_heads", "vocab_size", "tie_word_embeddings", "eos_token_id"}
    hybrid_model("nemotron_h").save_pretrained(tmp_path / "hybrid")
    file = tmp_path / "hybrid" / "model.safetensors"
    save_file(load_file(file) | PREDICTION, file, metadata={"format": "pt"})
    code, out, err = run("export", tmp_path / "hybrid", "--no-tokenizer", "--output", tmp_path / "hybrid.gguf")
    assert code == 0, err
    assert "left out of the weights: mtp.layers.0.eh_proj.weight, mtp.layers.0.enorm.weight, mtp" in err


def test_a_manifest_of_another_version() -> None:
    for value in (None, 3, {"tensors": "mtp"}, {"other": []}):
        assert LeftOut.from_json(value) == LeftOut()
    both = LeftOut(("a",), ("b",)) | LeftOut(("a", "c"), zeroed=("d",))
    assert both == LeftOut(("a", "c"), ("b",), ("d",))
    assert LeftOut.from_json(both.as_json()) == both
