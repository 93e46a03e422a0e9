"""Checkpoints of both dialects, read and written, against transformers' own loader and mamba_ssm's published rules."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

import ghostssm
from ghostssm.checkpoint.loading import Checkpoint
from ghostssm.ops.state_format import BFLOAT16
from ghostssm.plan.plan import Plan
from tests.conftest import random_windows, tiny_model
from tests.programs import in_process

IDS = torch.arange(1, 30)[None]
# What a mamba_ssm config.json that leaves the defaults out stands for.
THEIR_SIZES: dict[str, Any] = {"vocab_size": 288, "residual_in_fp32": True, "chunk_size": 256}
CONFIGS: list[dict[str, Any]] = [
    {},
    {"n_groups": 8, "tie_word_embeddings": False},
    {"n_groups": 2, "use_bias": True, "use_conv_bias": False, "time_step_limit": (0.01, 0.5)},
]


def logits_of(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits


def pruned_checkpoint(folder: Path, state_size: int = 5, **options: Any) -> tuple[Checkpoint, Plan]:
    checkpoint = ghostssm.load(str(folder), **options)
    plan = ghostssm.Calibration(checkpoint.model, random_windows(1, 40)).plan("ghost", state_size)
    ghostssm.apply_plan(checkpoint.model, plan)
    return checkpoint, plan


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_transformers_dialect(
    folder_of: Callable[..., Path], tmp_path: Path, config: dict[str, Any], dtype: torch.dtype
) -> None:
    folder = folder_of(**config)
    tiny_model(**config).to(dtype).save_pretrained(folder)
    checkpoint, plan = pruned_checkpoint(folder)
    assert checkpoint.model.dtype == dtype
    written = ghostssm.save(checkpoint, plan, tmp_path / "out")
    stock = AutoModelForCausalLM.from_pretrained(written)
    assert stock.dtype == dtype
    assert torch.equal(logits_of(stock.eval()), logits_of(checkpoint.model))
    assert AutoTokenizer.from_pretrained(written)("abc") == checkpoint.require_tokenizer()("abc")
    stored = json.loads((written / "config.json").read_text())
    assert stored["architectures"] == ["Mamba2ForCausalLM"]
    assert stored["state_size"] == 5
    assert stored["n_groups"] == config.get("n_groups", 1)
    assert stored["tie_word_embeddings"] == config.get("tie_word_embeddings", True)
    assert (stored["intermediate_size"], stored["rms_norm"]) == (64, True)
    assert str(tmp_path) not in (written / "config.json").read_text()
    # vLLM and SGLang take every *.safetensors for weights of the model.
    assert [path.name for path in written.glob("*.safetensors")] == ["model.safetensors"]


STOCK_SCRIPT = """
import sys, torch, transformers
folder, out = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
ids = torch.arange(1, 30)[None]
logits = model(ids).logits
greedy = model.generate(ids, max_new_tokens=8, do_sample=False)
talk = [{"role": "user", "content": "hi"}]
chat = tokenizer.apply_chat_template(talk, tokenize=False) if tokenizer.chat_template else ""
torch.save({"logits": logits, "greedy": greedy, "chat": chat}, out)
assert not any(name.startswith("ghostssm") for name in sys.modules)
"""


def in_stock_transformers(folder: Path, tmp_path: Path) -> dict[str, Any]:
    """What transformers makes of a folder in a process that never imports ghostssm."""
    out = tmp_path / "stock.pt"
    done = in_process(STOCK_SCRIPT, folder, out, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = torch.load(out, weights_only=True)
    return found


def test_stock_transformers_reads_it_without_ghostssm(
    folder_of: Callable[..., Path], tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    folder = folder_of(n_groups=2)
    AutoTokenizer.from_pretrained(folder, chat_template="{{ messages[0]['content'] }}!").save_pretrained(folder)
    checkpoint, plan = pruned_checkpoint(folder)
    written = ghostssm.save(checkpoint, plan, tmp_path / "out", untie=True)
    found = in_stock_transformers(written, tmp_path)
    assert torch.equal(found["logits"], logits_of(checkpoint.model))
    with torch.inference_mode():
        assert torch.equal(found["greedy"], checkpoint.model.generate(IDS, max_new_tokens=8, do_sample=False))
    assert found["chat"] == "hi!"


def test_stock_transformers_reads_what_came_from_mamba_ssm(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    folder = mamba_ssm_folder(tmp_path, tokenizer)
    (folder / "generation_config.json").write_text('{"eos_token_id": 7, "top_k": 3, "do_sample": true}')
    checkpoint, plan = pruned_checkpoint(folder)
    written = ghostssm.save(checkpoint, plan, tmp_path / "out")
    assert torch.equal(in_stock_transformers(written, tmp_path)["logits"], logits_of(checkpoint.model))
    stored = json.loads((written / "config.json").read_text())
    expected = {
        "model_type": "mamba2",
        "architectures": ["Mamba2ForCausalLM"],
        "n_groups": 1,
        "state_size": 5,
        "tie_word_embeddings": True,
        "intermediate_size": 64,
        "rms_norm": True,
        "head_dim": 8,
        "num_heads": 8,
        "chunk_size": 256,
    }
    assert {key: stored[key] for key in expected} == expected
    generation = GenerationConfig.from_pretrained(written)
    assert (generation.eos_token_id, generation.top_k, generation.do_sample) == (7, 3, True)


def test_untie_stores_the_head_and_leaves_the_model_as_it_was(folder_of: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint, plan = pruned_checkpoint(folder_of())
    written = ghostssm.save(checkpoint, plan, tmp_path / "out", untie=True)
    stored = safetensors.torch.load_file(written / "model.safetensors")
    assert torch.equal(stored["lm_head.weight"], stored["backbone.embeddings.weight"])
    assert json.loads((written / "config.json").read_text())["tie_word_embeddings"] is False
    model: Any = checkpoint.model
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.backbone.embeddings.weight
    tied = ghostssm.save(checkpoint, plan, tmp_path / "tied")
    assert "lm_head.weight" not in safetensors.torch.load_file(tied / "model.safetensors")
    with pytest.raises(ghostssm.InputError, match="always stores lm_head"):
        ghostssm.save(checkpoint, plan, tmp_path / "theirs", untie=True, dialect="mamba_ssm")


def test_untie_refuses_models_that_share_more(folder_of: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint, plan = pruned_checkpoint(folder_of())
    checkpoint.model.all_tied_weights_keys["backbone.layers.1.mixer.D"] = "backbone.layers.0.mixer.D"
    with pytest.raises(ghostssm.InputError, match=r"shares lm_head\.weight, backbone\.layers\.1\.mixer\.D"):
        ghostssm.save(checkpoint, plan, tmp_path / "out", untie=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dialect", ["transformers", "mamba_ssm"])
def test_what_belongs_to_a_model_is_carried_over(folder_of: Callable[..., Path], tmp_path: Path, dialect: Any) -> None:
    folder = folder_of()
    (folder / "LICENSE").write_text("the licence")
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<|endoftext|>"}')
    (folder / "notes.txt").write_text("somebody's")
    generation = GenerationConfig(eos_token_id=[0, 5], do_sample=True, temperature=0.7)
    generation.save_pretrained(folder)
    checkpoint, plan = pruned_checkpoint(folder)
    written = ghostssm.save(checkpoint, plan, tmp_path / "out", dialect=dialect)
    assert (written / "LICENSE").read_text() == "the licence"
    assert (written / "special_tokens_map.json").read_text() == '{"eos_token": "<|endoftext|>"}'
    assert not (written / "notes.txt").exists()
    read = GenerationConfig.from_pretrained(written)
    assert (read.eos_token_id, read.do_sample, read.temperature) == ([0, 5], True, 0.7)


def test_own_class_carries_the_generation_config(folder_of: Callable[..., Path], tmp_path: Path) -> None:
    folder = folder_of()
    GenerationConfig(eos_token_id=[0, 5]).save_pretrained(folder)
    checkpoint = ghostssm.load(str(folder))
    plan = ghostssm.Calibration(checkpoint.model, random_windows(1, 40)).plan("ghost+per-layer", 6, multiple=2)
    assert plan.needs_own_class
    smaller = ghostssm.apply_plan(checkpoint.model, plan)
    written = ghostssm.save(
        ghostssm.Checkpoint(smaller, checkpoint.tokenizer, checkpoint.source), plan, tmp_path / "out", untie=True
    )
    assert GenerationConfig.from_pretrained(written).eos_token_id == [0, 5]
    assert torch.equal(logits_of(ghostssm.load(str(written)).model), logits_of(smaller))


def test_manifest_and_plan(folder_of: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint, plan = pruned_checkpoint(folder_of())
    written = ghostssm.save(checkpoint, plan, tmp_path / "out")
    manifest = json.loads((written / "ghostssm.json").read_text())
    assert manifest["base_model"] == "model"
    assert manifest["base_model_sha256"] == checkpoint.source.fingerprint()
    assert manifest["state_size"] == {"before": 16, "after": 5}
    assert manifest["options"]["calibration"]["windows"] == 1
    assert {"python", "torch", "transformers", "tokenizers", "numba"} <= set(manifest["versions"])
    assert Plan.read(written).selections == plan.selections
    again = ghostssm.load(str(checkpoint.source.folder))
    ghostssm.apply_plan(again.model, Plan.read(written))
    assert torch.equal(logits_of(again.model), logits_of(checkpoint.model))


def mamba_ssm_folder(tmp_path: Path, tokenizer: PreTrainedTokenizerFast | None, **extra: Any) -> Path:
    """A folder as the published state-spaces checkpoints have it; written without the project's own writer."""
    model = tiny_model(**THEIR_SIZES)
    folder = tmp_path / "theirs"
    folder.mkdir()
    state = {k.replace("backbone.embeddings", "backbone.embedding"): v for k, v in model.state_dict().items()}
    torch.save(state, folder / "pytorch_model.bin")
    config = {
        "d_model": 32,
        "n_layer": 3,
        "vocab_size": 281,  # padded to 288, as mamba_ssm pads
        "ssm_cfg": {"layer": "Mamba2", "d_state": 16, "headdim": 8},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 16,
    }
    (folder / "config.json").write_text(json.dumps(config | extra))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def test_mamba_ssm_dialect_reads_as_the_same_model(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    checkpoint = ghostssm.load(str(mamba_ssm_folder(tmp_path, tokenizer)))
    assert checkpoint.source.dialect == "mamba_ssm"
    assert torch.equal(logits_of(checkpoint.model), logits_of(tiny_model(**THEIR_SIZES)))


def test_mamba_ssm_round_trip(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    folder = mamba_ssm_folder(tmp_path, tokenizer)
    checkpoint, plan = pruned_checkpoint(folder)
    written = ghostssm.save(checkpoint, plan, tmp_path / "out", dialect="mamba_ssm")
    before, after = (json.loads((f / "config.json").read_text()) for f in (folder, written))
    assert after["ssm_cfg"].pop("d_state") == 5
    assert before["ssm_cfg"].pop("d_state") == 16
    assert after == before
    read = ghostssm.load(str(written))
    assert read.source.dialect == "mamba_ssm"
    assert torch.equal(logits_of(read.model), logits_of(checkpoint.model))
    stored = torch.load(written / "pytorch_model.bin", weights_only=True)
    assert set(stored) == set(torch.load(folder / "pytorch_model.bin", weights_only=True))


@pytest.mark.parametrize("config", CONFIGS)
def test_transformers_to_mamba_ssm_and_back(
    folder_of: Callable[..., Path], tmp_path: Path, config: dict[str, Any]
) -> None:
    checkpoint, plan = pruned_checkpoint(folder_of(**config))
    written = ghostssm.save(checkpoint, plan, tmp_path / "out", dialect="mamba_ssm")
    read = ghostssm.load(str(written))
    assert torch.equal(logits_of(read.model), logits_of(checkpoint.model))
    written_back = ghostssm.save(read, plan, tmp_path / "back")
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(written_back).eval()), logits_of(read.model))


def test_unpadded_vocabulary_and_legacy_pickle(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    folder = mamba_ssm_folder(tmp_path, tokenizer, vocab_size=288, pad_vocab_size_multiple=1)
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert ghostssm.load(str(folder)).model.config.vocab_size == 288


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_sharded_weights(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, suffix: str) -> None:
    folder = mamba_ssm_folder(tmp_path, tokenizer)
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    (folder / "pytorch_model.bin").unlink()
    state.pop("lm_head.weight")
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    weight_map = {}
    for number, names in enumerate((list(state)[::2], list(state)[1::2]), 1):
        file = f"{stem}-0000{number}-of-00002.{suffix}"
        part = {name: state[name].contiguous() for name in names}
        if suffix == "safetensors":
            safetensors.torch.save_file(part, folder / file)
        else:
            torch.save(part, folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert torch.equal(logits_of(ghostssm.load(str(folder)).model), logits_of(tiny_model(**THEIR_SIZES)))


def test_sharded_transformers_checkpoint(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert torch.equal(logits_of(ghostssm.load(str(tmp_path / "sharded")).model), logits_of(tiny_model()))


def test_describe_reads_no_weights(folder_of: Callable[..., Path]) -> None:
    folder = folder_of(n_groups=2)
    model = tiny_model(n_groups=2)
    (folder / "model.safetensors").unlink()
    found = ghostssm.describe(str(folder))
    assert (found.layers, found.layout.n_groups, found.layout.state_size) == (3, 2, 16)
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert found.state_bytes() == 3 * 8 * 8 * 16 * 4
    assert found.state_bytes(4, BFLOAT16) == 3 * 8 * 8 * 4 * 2
    plan = ghostssm.Calibration(model, random_windows(1, 20)).plan("random", 4)
    ghostssm.apply_plan(model, plan)
    assert found.parameters - found.removed_parameters(4) == sum(p.numel() for p in model.parameters())
