"""A model's tensors and mixer sizes under llama.cpp's names, in the shape and meaning that it expects."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ghostssm.checkpoint.gguf.architectures import Architecture
from ghostssm.errors import ModelError
from ghostssm.models.families import layout_of
from ghostssm.models.layout import SSDLayout
from ghostssm.units import listed

_BIASES = ("ssm_conv1d.bias", "ssm_dt.bias", "exp_probs_b.bias")


def gguf_tensors(architecture: Architecture, config: Any, model: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a model under its GGUF name, in the shape and meaning that llama.cpp expects.

    A is stored as -exp(A_log), float32; A and D as (h, 1); conv1d as (channels, taps); the gated norm's weight as
    (groups, width); a tied head is left out.

    Raises:
        ModelError: a tensor that the architecture has no place for; all are named.
    """
    layout = layout_of(config)
    tensors = model.state_dict()
    names = _gguf_names(architecture, config.num_hidden_layers, tensors)
    _check_places(architecture, names)
    for name, tensor in tensors.items():
        for final, changed in architecture.tensors(config, str(names[name]), tensor):
            yield final, _mixer_tensor(layout, final, changed)
    if not any(name.endswith("conv1d.bias") for name in tensors):
        for index in _mixer_indices(names):
            yield f"blk.{index}.ssm_conv1d.bias", torch.zeros(layout.conv_dim)


def _gguf_names(architecture: Architecture, blocks: int, tensors: Iterable[str]) -> dict[str, str | None]:
    """Transformers' tensor names to those in GGUF, None where there is none."""
    import gguf

    arch = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[architecture.name]
    table = gguf.get_tensor_name_map(arch, blocks)
    ours, theirs = architecture.prefix

    def gguf_name(name: str) -> str | None:
        block, _, part = name.partition(".layers.")[2].partition(".")
        if part in architecture.names:
            return f"blk.{block}.{architecture.names[part]}"
        known = theirs + name.removeprefix(ours) if name.startswith(ours) else name
        listed: str | None = table.get_name(known.replace(".dt_bias", ".dt_proj.bias"), (".weight", ".bias"))
        return listed

    return {name: gguf_name(name) for name in tensors}


def _check_places(architecture: Architecture, names: Mapping[str, str | None]) -> None:
    """llama.cpp's graphs add the biases of the convolution, of dt and of an expert's score, and no others."""
    without_place = [
        name
        for name, theirs in names.items()
        if theirs is None or (theirs.endswith(".bias") and not theirs.endswith(_BIASES))
    ]
    if without_place:
        raise ModelError(
            f"llama.cpp's {architecture.name} has no place for {listed(without_place, 4)}; "
            "this model can't be written as GGUF; export --format transformers for another engine."
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
