"""GGUF files, read back with the gguf package's own reader, and rebuilt into stock transformers models."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from transformers import Mamba2Config, Mamba2ForCausalLM, PreTrainedTokenizerFast

import ghostssm
from ghostssm.errors import InputError, ModelError, NumericalError, OutputError
from tests.conftest import tiny_model
from tests.engines.hybrids import HYBRIDS, hybrid_model

gguf = pytest.importorskip("gguf", reason="needs gguf: pip install 'ghostssm[gguf]'")

FolderOf = Callable[..., Path]
IDS = torch.arange(1, 30)[None]
CONFIGS: list[dict[str, Any]] = [
    {},
    {"n_groups": 8, "tie_word_embeddings": False},
    {"n_groups": 2, "state_size": 5, "use_conv_bias": False},
]


def read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Keys and values, and all tensors as float32."""
    reader = gguf.GGUFReader(path)
    values = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    tensors = {
        tensor.name: torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        for tensor in reader.tensors
    }
    return values, tensors


def rebuilt(path: Path) -> Mamba2ForCausalLM:
    """A stock model from nothing but a GGUF file."""
    values, tensors = read(path)
    sizes = {name.removeprefix("mamba2."): value for name, value in values.items() if name.startswith("mamba2.")}
    heads, width = sizes["ssm.time_step_rank"], sizes["ssm.inner_size"]
    config = Mamba2Config(
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["embedding_length"],
        num_hidden_layers=sizes["block_count"],
        state_size=sizes["ssm.state_size"],
        num_heads=heads,
        head_dim=width // heads,
        expand=width // sizes["embedding_length"],
        n_groups=sizes["ssm.group_count"],
        conv_kernel=sizes["ssm.conv_kernel"],
        layer_norm_epsilon=sizes["attention.layer_norm_rms_epsilon"],
        residual_in_fp32=False,
        chunk_size=16,
        tie_word_embeddings="output.weight" not in tensors,
    )
    state = {
        "backbone.embeddings.weight": tensors["token_embd.weight"],
        "backbone.norm_f.weight": tensors["output_norm.weight"],
        "lm_head.weight": tensors.get("output.weight", tensors["token_embd.weight"]),
    }
    for i in range(config.num_hidden_layers):
        layer, block = f"backbone.layers.{i}", f"blk.{i}"
        state |= {
            f"{layer}.norm.weight": tensors[f"{block}.attn_norm.weight"],
            f"{layer}.mixer.in_proj.weight": tensors[f"{block}.ssm_in.weight"],
            f"{layer}.mixer.conv1d.weight": tensors[f"{block}.ssm_conv1d.weight"][:, None],
            f"{layer}.mixer.conv1d.bias": tensors[f"{block}.ssm_conv1d.bias"],
            f"{layer}.mixer.dt_bias": tensors[f"{block}.ssm_dt.bias"],
            f"{layer}.mixer.A_log": torch.log(-tensors[f"{block}.ssm_a"][:, 0]),
            f"{layer}.mixer.D": tensors[f"{block}.ssm_d"][:, 0],
            f"{layer}.mixer.norm.weight": tensors[f"{block}.ssm_norm.weight"].flatten(),
            f"{layer}.mixer.out_proj.weight": tensors[f"{block}.ssm_out.weight"],
        }
    model = Mamba2ForCausalLM(config)
    model.load_state_dict(state)
    return model.eval()


def logits_of(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits


@pytest.mark.parametrize("config", CONFIGS)
def test_a_model_rebuilt_from_the_file_has_the_same_logits(
    folder_of: FolderOf, tmp_path: Path, config: dict[str, Any]
) -> None:
    checkpoint = ghostssm.load(str(folder_of(**config)))
    written = ghostssm.export_gguf(checkpoint, tmp_path / "model.gguf")
    assert (written.architecture, written.dtype, written.notes) == ("mamba2", "f32", ())
    assert written.bytes == (tmp_path / "model.gguf").stat().st_size
    assert written.tensors == len(read(written.path)[1])
    torch.testing.assert_close(logits_of(rebuilt(written.path)), logits_of(tiny_model(**config)), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("dtype", "file_type", "stored"), [("f16", 1, "F16"), ("bf16", 32, "BF16"), ("q8_0", 7, "Q8_0"), ("f32", 0, "F32")]
)
def test_number_formats(folder_of: FolderOf, tmp_path: Path, dtype: Any, file_type: int, stored: str) -> None:
    checkpoint = ghostssm.load(str(folder_of(hidden_size=48, num_heads=12)))
    path = ghostssm.export_gguf(checkpoint, tmp_path / "model.gguf", dtype=dtype).path
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert kinds.pop("blk.0.ssm_out.weight") == stored
    # Rows of 48 numbers are no whole blocks of 32.
    assert {kinds.pop(f"{name}.weight") for name in ("blk.0.ssm_in", "token_embd")} == {
        "F16" if dtype == "q8_0" else stored
    }
    always = ("ssm_conv1d.weight", "ssm_conv1d.bias", "ssm_dt.bias", "ssm_a", "ssm_d", "ssm_norm.weight")
    assert {kinds[f"blk.0.{name}"] for name in always} == {"F32"}
    values, tensors = read(path)
    assert values["general.file_type"] == file_type
    original = checkpoint.model.backbone.layers[0].mixer.out_proj.weight
    step = {"f32": 0.0, "f16": 2**-11, "bf16": 2**-8, "q8_0": 0.5 / 127}[dtype]
    assert (tensors["blk.0.ssm_out.weight"] - original).abs().max() <= step * original.abs().max() * 1.001


def test_stored_numbers_are_kept(tmp_path: Path) -> None:
    """The reference model is stored in bfloat16: its file holds these very numbers."""
    checkpoint = ghostssm.load("reference")
    written = ghostssm.export_gguf(checkpoint, tmp_path / "model.gguf")
    assert written.dtype == "bf16"
    _, tensors = read(written.path)
    assert torch.equal(tensors["token_embd.weight"], checkpoint.model.backbone.embeddings.weight.float())
    mixer = checkpoint.model.backbone.layers[3].mixer
    assert torch.equal(tensors["blk.3.ssm_conv1d.weight"], mixer.conv1d.weight[:, 0].float())


def test_tokenizer_and_origin(folder_of: FolderOf, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    folder = folder_of(name="mine")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Mine\n")
    manifest = {"base_model": "org/base-2b", "method": "ghost", "state_size": {"before": 128, "after": 16}}
    (folder / "ghostssm.json").write_text(json.dumps(manifest))
    written = ghostssm.export_gguf(ghostssm.load(str(folder)), tmp_path / "model.gguf")
    values, _ = read(written.path)
    assert values["general.name"] == "mine"
    assert values["general.license"] == "apache-2.0"
    assert values["general.base_model.0.name"] == "base-2b"
    assert values["general.base_model.0.repo_url"] == "https://huggingface.co/org/base-2b"
    assert "from 128 to 16 channels" in values["general.description"]
    assert (values["tokenizer.ggml.model"], values["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    tokens, types = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == 288
    assert [tokens[index] for index in range(257)] == tokenizer.convert_ids_to_tokens(list(range(257)))
    assert (types[0], set(types[1:257]), set(types[257:])) == (3, {1}, {5})
    ends = [values[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "padding")]
    assert ends == [0, 0, 0]
    assert not values["tokenizer.ggml.add_bos_token"]


def test_without_a_tokenizer(folder_of: FolderOf, tmp_path: Path) -> None:
    folder = folder_of()
    for path in folder.glob("tokenizer*"):
        path.unlink()
    checkpoint = ghostssm.load(str(folder))
    with pytest.raises(ModelError, match="--tokenizer"):
        ghostssm.export_gguf(checkpoint, tmp_path / "model.gguf")
    written = ghostssm.export_gguf(checkpoint, tmp_path / "model.gguf", with_tokenizer=False)
    values, _ = read(written.path)
    assert values["tokenizer.ggml.model"] == "no_vocab"
    assert values["mamba2.vocab_size"] == 288


def byte_level(**parts: Any) -> PreTrainedTokenizerFast:
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = parts.pop("model", tokenizers.models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    bpe = tokenizers.Tokenizer(model)
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    for name, part in parts.items():
        setattr(bpe, name, part)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="!", bos_token='"')


def template(single: str) -> Any:
    return tokenizers.processors.TemplateProcessing(single=single, special_tokens=[("!", 0), ('"', 1)])


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"model": tokenizers.models.WordLevel({"a": 0, "!": 1}, "!")}, "is a WordLevel model"),
        ({"model": tokenizers.models.BPE({"a": 0, "!": 1}, [], byte_fallback=True)}, "byte fallback"),
        ({"model": tokenizers.models.BPE({"a": 0, "!": 1}, [], end_of_word_suffix="</w>")}, "end_of_word_suffix"),
        ({"normalizer": tokenizers.normalizers.Lowercase()}, "normalises text with Lowercase"),
        ({"pre_tokenizer": tokenizers.pre_tokenizers.Whitespace()}, "cuts text by.*Whitespace"),
        ({"pre_tokenizer": tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)}, "add_prefix_space"),
        ({"post_processor": template("! ! $A")}, "more than a beginning and an end"),
    ],
)
def test_tokenizers_that_llama_cpp_does_not_have(
    folder_of: FolderOf, tmp_path: Path, parts: dict[str, Any], message: str
) -> None:
    checkpoint = ghostssm.load(str(folder_of()))
    other = ghostssm.Checkpoint(checkpoint.model, byte_level(**parts), checkpoint.source)
    with pytest.raises(ModelError, match=rf"{message}.*--tokenizer"):
        ghostssm.export_gguf(other, tmp_path / "model.gguf")
    assert not list(tmp_path.glob("*.gguf"))


@pytest.mark.parametrize(
    ("single", "ends"), [('" $A', (True, False)), ('" $A !', (True, True)), ("$A", (False, False))]
)
def test_added_ends(folder_of: FolderOf, tmp_path: Path, single: str, ends: tuple[bool, bool]) -> None:
    checkpoint = ghostssm.load(str(folder_of()))
    tokenizer = byte_level(post_processor=template(single), normalizer=tokenizers.normalizers.NFC())
    other = ghostssm.Checkpoint(checkpoint.model, tokenizer, checkpoint.source)
    written = ghostssm.export_gguf(other, tmp_path / "model.gguf")
    values, _ = read(written.path)
    assert (values["tokenizer.ggml.add_bos_token"], values["tokenizer.ggml.add_eos_token"]) == ends
    assert "NFC" in written.notes[0]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_bias": True}, "it has no biases in in_proj, out_proj"),
        ({"time_step_limit": (0.01, 0.5)}, "it knows no limits on dt"),
    ],
)
def test_models_that_llama_cpp_computes_otherwise(
    folder_of: FolderOf, tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    checkpoint = ghostssm.load(str(folder_of(**config)))
    with pytest.raises(ModelError, match=message):
        ghostssm.export_gguf(checkpoint, tmp_path / "model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_numbers_beyond_float16(folder_of: FolderOf, tmp_path: Path) -> None:
    checkpoint = ghostssm.load(str(folder_of()))
    with torch.no_grad():
        checkpoint.model.backbone.layers[1].mixer.out_proj.weight[0, 0] = 1e5
    target = tmp_path / "model.gguf"
    target.write_text("old")
    with pytest.raises(NumericalError, match=r"blk\.1\.ssm_out\.weight.*--dtype bf16"):
        ghostssm.export_gguf(checkpoint, target, dtype="f16", overwrite=True)
    assert target.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.gguf"]
    ghostssm.export_gguf(checkpoint, target, dtype="bf16", overwrite=True)
    assert target.stat().st_size > 1000


def test_places_that_must_not_be_written(folder_of: FolderOf, tmp_path: Path) -> None:
    checkpoint = ghostssm.load(str(folder_of()))
    (tmp_path / "there.gguf").write_text("x")
    for path, message in (
        (tmp_path, "is a folder"),
        (tmp_path / "there.gguf", "exists.*--overwrite"),
        (tmp_path / "there.gguf" / "in.gguf", "can't be written"),
    ):
        with pytest.raises(OutputError, match=message):
            ghostssm.export_gguf(checkpoint, path)
    assert (tmp_path / "there.gguf").read_text() == "x"


def test_the_package_is_asked_for_where_it_is_missing(
    folder_of: FolderOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = ghostssm.load(str(folder_of()))
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(InputError, match=r"needs gguf, .* pip install 'ghostssm\[gguf\]'\."):
        ghostssm.export_gguf(checkpoint, tmp_path / "model.gguf")


@pytest.mark.parametrize("name", HYBRIDS)
def test_hybrids_lose_no_tensor(tmp_path: Path, name: str) -> None:
    """What llama.cpp makes of them is tested where it is installed."""
    model = hybrid_model(name)
    checkpoint = ghostssm.Checkpoint(model, None, ghostssm.find_source("reference"))
    written = ghostssm.export_gguf(checkpoint, tmp_path / "model.gguf", with_tokenizer=False)
    values, tensors = read(written.path)
    arch = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}[values["general.architecture"]]
    known = {gguf.TENSOR_NAMES[kind] for kind in gguf.MODEL_TENSORS[arch]}
    bare = {re.sub(r"blk\.\d+\.", "blk.{bid}.", key).removesuffix(".weight").removesuffix(".bias") for key in tensors}
    assert bare <= known
    second_head = "output.weight" in tensors and model.config.tie_word_embeddings
    buffers = sum(part.numel() for key, part in model.state_dict().items() if key.endswith("correction_bias"))
    extra = model.get_input_embeddings().weight.numel() if second_head else 0
    assert sum(tensor.numel() for tensor in tensors.values()) == model.num_parameters() + buffers + extra
    assert values[f"{written.architecture}.ssm.state_size"] == 12


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("bamba", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "no other rope_type"),
        ("falcon_h1", {"mamba_norm_before_gate": True}, "mamba_norm_before_gate"),
        ("granitemoehybrid", {"hidden_size": 32}, "twice as wide as the hidden size"),
        ("nemotron_h", {"layers_block_type": ["linear_attention", "moe", "mlp"]}, "experts or plain MLPs, not both"),
        ("nemotron_h", {"model_type": "zamba2"}, "'zamba2'.*expected one of: bamba"),
    ],
)
def test_hybrids_that_llama_cpp_computes_otherwise(
    tmp_path: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    model = hybrid_model(name)
    for key, value in changes.items():
        object.__setattr__(model.config, key, value)
    checkpoint = ghostssm.Checkpoint(model, None, ghostssm.find_source("reference"))
    with pytest.raises(ModelError, match=message):
        ghostssm.export_gguf(checkpoint, tmp_path / "model.gguf", with_tokenizer=False)
    assert not list(tmp_path.iterdir())
