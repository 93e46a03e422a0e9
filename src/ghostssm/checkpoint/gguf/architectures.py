"""How models of each family appear in GGUF: llama.cpp's architecture, its keys, and its tensors.

The facts are those of llama.cpp's ``src/models/*.cpp`` (what is read and computed) and of the converter in its
``conversion/`` folder, version of July 2026. One entry of ``ARCHITECTURES`` is one family.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ghostssm.errors import ModelError
from ghostssm.layout import SSDLayout

NO_LIMIT = 2**20
"""Context length of a model whose positions are not limited; llama.cpp wants some number."""

TensorMap = Callable[[Any, str, Tensor], Iterator[tuple[str, Tensor]]]


def _unchanged(config: Any, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield name, tensor


def _no_faults(config: Any) -> list[str]:
    return []


@dataclass(frozen=True)
class Architecture:
    """One family in GGUF.

    Attributes:
        name: of llama.cpp's architecture.
        layout: config to the sizes of the mixers.
        write_keys: writes the keys beside those of the mixers into a ``gguf.GGUFWriter``.
        renames: parts of transformers' tensor names to what the ``gguf`` package's table of names has in their place.
        tensors: turns a config, a GGUF name and a tensor into the tensors to write, where they are not the same.
        faults: what in a config llama.cpp does not compute.
    """

    name: str
    layout: Callable[[Any], SSDLayout]
    write_keys: Callable[[Any, Any], None]
    renames: Mapping[str, str] = field(default_factory=dict)
    tensors: TensorMap = _unchanged
    faults: Callable[[Any], list[str]] = _no_faults


def architecture_of(config: Any) -> Architecture:
    """The architecture of a transformers config.

    Raises:
        ModelError: llama.cpp has none, or computes something else than this config asks for.
    """
    try:
        found = ARCHITECTURES[config.model_type]
    except KeyError:
        raise ModelError(
            f"The model type is {config.model_type!r}, which can't be written as GGUF; "
            f"expected one of: {', '.join(sorted(ARCHITECTURES))}."
        ) from None
    low, high = _dt_limit(config)
    faults = found.faults(config)
    if low > 0 or high != math.inf:
        faults = [*faults, f"time_step_limit is {low:g} to {high:g}, and dt is not limited there"]
    if faults:
        raise ModelError(f"llama.cpp would compute another model ({found.name}): " + "; ".join(faults) + ".")
    return found


def gguf_tensors(architecture: Architecture, model: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a model under its GGUF name, in the shape and meaning that llama.cpp expects.

    A is stored as -exp(A_log), float32; A and D as (h, 1); conv1d as (channels, taps); the gated norm's weight as
    (groups, width); a tied head is left out.

    Raises:
        ModelError: a tensor that the architecture has no place for; all are named.
    """
    import gguf

    config, layout = model.config, architecture.layout(model.config)
    arch = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[architecture.name]
    table = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    renames = {".dt_bias": ".dt_proj.bias"} | dict(architecture.renames)
    tensors = model.state_dict()
    names = {}
    for name in tensors:
        known = name
        for part, other in renames.items():
            known = known.replace(part, other)
        names[name] = table.get_name(known, try_suffixes=(".weight", ".bias"))
    _check_places(architecture, names)
    for name, tensor in tensors.items():
        for final, changed in architecture.tensors(config, names[name], tensor):
            yield final, _mixer_tensor(layout, final, changed)
    if not any(name.endswith("conv1d.bias") for name in tensors):
        for index in _mixer_indices(names):
            yield f"blk.{index}.ssm_conv1d.bias", torch.zeros(layout.conv_dim)


def _check_places(architecture: Architecture, names: Mapping[str, str | None]) -> None:
    """llama.cpp's graphs add the biases of the convolution and of dt, and no others."""
    homeless = [
        name
        for name, found in names.items()
        if found is None or (found.endswith(".bias") and not found.endswith(("ssm_conv1d.bias", "ssm_dt.bias")))
    ]
    if homeless:
        more = f" and {len(homeless) - 4} more" if len(homeless) > 4 else ""
        raise ModelError(
            f"llama.cpp's {architecture.name} has no place for {', '.join(homeless[:4])}{more}; "
            "this model can't be written as GGUF."
        )


def _mixer_indices(names: Mapping[str, str | None]) -> list[int]:
    return [int(name.split(".")[1]) for name in names.values() if name and name.endswith(".ssm_a")]


def _mixer_tensor(layout: SSDLayout, name: str, tensor: Tensor) -> Tensor:
    """A mixer's tensor as llama.cpp has it; others as they are."""
    if name.endswith(".ssm_a"):
        return -torch.exp(tensor.float())[:, None]
    if name.endswith(".ssm_d"):
        return tensor[:, None]
    if name.endswith(".ssm_conv1d.weight"):
        return tensor.squeeze(1)
    if name.endswith(".ssm_norm.weight"):
        return tensor.reshape(layout.n_groups, -1)
    return tensor


def write_mixer_keys(writer: Any, layout: SSDLayout) -> None:
    writer.add_ssm_conv_kernel(layout.conv_kernel)
    writer.add_ssm_inner_size(layout.intermediate_size)
    writer.add_ssm_state_size(layout.state_size)
    writer.add_ssm_time_step_rank(layout.num_heads)  # the key that holds the number of heads
    writer.add_ssm_group_count(layout.n_groups)


def _dt_limit(config: Any) -> tuple[float, float]:
    low, high = getattr(config, "time_step_limit", None) or (0.0, math.inf)
    return float(low), float(high)


# --- Mamba-2 ---------------------------------------------------------------------------------------------------------


def _mamba2_layout(config: Any) -> SSDLayout:
    return SSDLayout(
        hidden_size=config.hidden_size,
        num_heads=config.num_heads,
        head_dim=config.head_dim,
        n_groups=config.n_groups,
        state_size=config.state_size,
        conv_kernel=config.conv_kernel,
    )


def _mamba2_keys(writer: Any, config: Any) -> None:
    writer.add_context_length(NO_LIMIT)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(0)  # llama.cpp reads these two of every model
    writer.add_head_count(0)
    writer.add_layer_norm_rms_eps(config.layer_norm_epsilon)


def _mamba2_tensors(config: Any, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    if name != "output.weight" or not config.tie_word_embeddings:
        yield name, tensor


ARCHITECTURES: dict[str, Architecture] = {
    "mamba2": Architecture("mamba2", _mamba2_layout, _mamba2_keys, tensors=_mamba2_tensors),
}
