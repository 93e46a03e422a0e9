"""Write a model as one GGUF file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import yaml
from huggingface_hub import metadata_load
from torch import Tensor
from transformers import PreTrainedConfig

from ghostssm.checkpoint.exporting import require_stock
from ghostssm.checkpoint.gguf.architectures import Architecture, architecture_of
from ghostssm.checkpoint.gguf.tensors import gguf_tensors, write_mixer_keys
from ghostssm.checkpoint.gguf.tokenizer import Vocabulary, vocabulary_of
from ghostssm.checkpoint.left_out import LeftOut, keys_left_out, unread_tensors
from ghostssm.checkpoint.loading import Checkpoint, in_memory
from ghostssm.checkpoint.manifest import Manifest
from ghostssm.checkpoint.place import is_hub_id
from ghostssm.checkpoint.source import Source
from ghostssm.errors import ModelError, NumericalError
from ghostssm.extras import check_installed
from ghostssm.files.outputs import OutputFile, storing
from ghostssm.models.families import layout_of
from ghostssm.units import sizes_text
from ghostssm.values import Value

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NumberFormat = Literal["f32", "f16", "bf16", "q8_0"]
_OF_DTYPE: dict[torch.dtype, NumberFormat] = {
    torch.float32: "f32",
    torch.float64: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
}
_TOLD_BY_TENSORS = frozenset(
    {
        *("expand", "mamba_expand", "mamba_d_ssm", "hidden_act", "mamba_hidden_act"),
        *("use_bias", "use_conv_bias", "mamba_conv_bias", "mamba_proj_bias", "attention_bias", "mlp_bias"),
    }
)
"""Keys that the file does without: its tensors and their shapes say the same, or the architecture has one choice."""
_TOLD_BY_VOCABULARY = frozenset({"bos_token_id", "eos_token_id", "pad_token_id"})


@dataclass(frozen=True, repr=False)
class ExportedGGUF(Value):
    """What was written.

    Attributes:
        path: where it is.
        architecture: llama.cpp's name of it.
        dtype: of the large matrices.
        tensors: how many.
        bytes: of the file.
        notes: where llama.cpp may do otherwise than transformers.
        left_out: of the checkpoint's config and weights.
    """

    path: Path
    architecture: str
    dtype: NumberFormat
    tensors: int
    bytes: int
    notes: tuple[str, ...]
    left_out: LeftOut


def export_gguf(
    checkpoint: Checkpoint | PreTrainedModel,
    output: Path | str | OutputFile,
    *,
    dtype: NumberFormat | None = None,
    with_tokenizer: bool = True,
    overwrite: bool = False,
) -> ExportedGGUF:
    """Write a checkpoint for llama.cpp: weights, sizes, tokenizer and origin in one GGUF file.

    Matrices are stored in ``dtype``; norms, biases, A, D and the convolution in float32 always, as llama.cpp expects;
    with q8_0, matrices whose rows are no multiple of 32 in float16.

    Args:
        checkpoint: or a model alone, of which a file without a tokenizer can be written.
        output: the file to write, which appears whole or not at all.
        dtype: f32, f16, bf16 or q8_0 (8 bits in blocks of 32); None is that of the weights in memory.
        with_tokenizer: False for a file without one, which llama.cpp runs on token ids only.
        overwrite: replace a file that is there.

    Raises:
        InputError: the ``gguf`` package is missing, or the model is one of our own class.
        ModelError: a model or tokenizer that llama.cpp can't run as it is; says why and what to do.
        NumericalError: a weight too large for float16.
        OutputError: the file must not or can't be written; nothing is left behind.
    """
    gguf = _gguf()
    checkpoint = in_memory(checkpoint)
    require_stock(checkpoint, "llama.cpp")
    model = checkpoint.model
    number_format = dtype or _OF_DTYPE[model.dtype]
    file = output if isinstance(output, OutputFile) else OutputFile(output, overwrite)
    config: Any = _ReadConfig(model.config)
    architecture = architecture_of(config)
    vocabulary = vocabulary_of(checkpoint.require_tokenizer(), model.config) if with_tokenizer else None
    with file, storing(file.path):
        writer = gguf.GGUFWriter(file.partial, architecture.name)
        try:
            _write_keys(writer, config, architecture, number_format, checkpoint.source, vocabulary)
            count = _write_tensors(writer, model, config, architecture, number_format)
            writer.close()
            file.commit()
        finally:
            writer.close()
    notes = vocabulary.notes if vocabulary else ()
    written = config.keys_read | _TOLD_BY_TENSORS | (_TOLD_BY_VOCABULARY if vocabulary else frozenset())
    missing = LeftOut(
        tensors=unread_tensors(checkpoint.source, model),
        config_keys=keys_left_out(checkpoint.source, model.config, written),
    )
    size = file.path.stat().st_size
    return ExportedGGUF(file.path, architecture.name, number_format, count, size, notes, missing)


class _ReadConfig:
    """A model's config that notes which of its keys are read; the user is told of the others."""

    def __init__(self, config: PreTrainedConfig):
        self._config = config
        self.keys_read: set[str] = set()

    def __getattr__(self, key: str) -> Any:
        value = getattr(self._config, key)
        self.keys_read.add(key)
        return value


def _gguf() -> Any:
    check_installed("A GGUF file", "gguf")
    import gguf

    return gguf


def _write_keys(
    writer: Any,
    config: Any,
    architecture: Architecture,
    number_format: NumberFormat,
    source: Source,
    vocabulary: Vocabulary | None,
) -> None:
    import gguf

    file_types = {
        "f32": gguf.LlamaFileType.ALL_F32,
        "f16": gguf.LlamaFileType.MOSTLY_F16,
        "bf16": gguf.LlamaFileType.MOSTLY_BF16,
        "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    }
    writer.add_type(gguf.GGUFType.MODEL)
    _write_metadata(writer, source)
    writer.add_file_type(file_types[number_format])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    architecture.write_keys(writer, config)
    write_mixer_keys(writer, layout_of(config))
    if vocabulary is None:
        writer.add_tokenizer_model("no_vocab")
    else:
        vocabulary.write(writer)


def _write_tensors(
    writer: Any, model: PreTrainedModel, config: Any, architecture: Architecture, number_format: NumberFormat
) -> int:
    """Names and shapes first, as the format has it; then the data, one tensor in memory at a time."""
    import gguf
    import numpy as np

    formats = {}
    for name, tensor in gguf_tensors(architecture, config, model):
        formats[name] = _format_of(name, tensor, number_format)
        block, size = gguf.GGML_QUANT_SIZES[formats[name]]
        nbytes = tensor.numel() // block * size
        writer.add_tensor_info(name, tuple(tensor.shape), np.dtype(np.float32), nbytes, raw_dtype=formats[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in gguf_tensors(architecture, config, model):
        plain = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
        if formats[name] == gguf.GGMLQuantizationType.F16 and np.abs(plain).max() > np.finfo(np.float16).max:
            raise NumericalError(f"{name} has numbers too large for float16; export with --dtype bf16 or f32.")
        writer.write_tensor_data(gguf.quants.quantize(plain, formats[name]))
    return len(formats)


def _format_of(name: str, tensor: Tensor, number_format: NumberFormat) -> Any:
    """llama.cpp's kernels read vectors, norms, the convolution and routers in float32 only."""
    import gguf

    kinds = gguf.GGMLQuantizationType
    small = tensor.ndim == 1 or not name.endswith(".weight") or name.endswith("_norm.weight")
    if small or name.endswith(("ssm_conv1d.weight", "ffn_gate_inp.weight")):
        return kinds.F32
    if number_format == "q8_0" and tensor.shape[-1] % gguf.GGML_QUANT_SIZES[kinds.Q8_0][0]:
        return kinds.F16
    return kinds[number_format.upper()]


def _write_metadata(writer: Any, source: Source) -> None:
    """Write the ``general`` keys into a ``gguf.GGUFWriter``.

    They come from the model card (README.md) and ``ghostssm.json``; both may be missing.
    """
    card = _card(source.folder / "README.md")
    try:
        manifest = Manifest.read(source.folder)
    except ModelError:
        manifest = Manifest()
    writer.add_name(Path(source.name).resolve().name if Path(source.name).is_dir() else source.name.rpartition("/")[2])
    if isinstance(card.get("license"), str) and card["license"]:
        writer.add_license(card["license"])
    before, after = manifest.state_size_before, manifest.state_size_after
    if manifest.method is not None and before is not None and after is not None:
        kept = sizes_text((after,) if isinstance(after, int) else after)
        writer.add_description(
            f"Recurrent state pruned from {before} to {kept} channels by ghostssm ({manifest.method})"
        )
    base = manifest.base_model or card.get("base_model")
    base = base[0] if isinstance(base, list) and base else base
    if base:
        _write_base_model(writer, str(base))


def _write_base_model(writer: Any, base: str) -> None:
    name = base if is_hub_id(base) else Path(base).name  # a folder's name, not where it lay on someone's disk
    organization, _, last = name.rpartition("/")
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, last)
    if organization:
        writer.add_base_model_organization(0, organization)
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{name}")


def _card(path: Path) -> dict[str, Any]:
    try:
        return metadata_load(path) or {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}
