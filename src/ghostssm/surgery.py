"""Apply decisions to weights: physical slicing, with exact zero channels where groups are uneven.

A padded channel has a zero row in in_proj and zero conv taps and bias, so that B and C are SiLU(0) = 0 there: its state
stays zero and y does not change.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ghostssm.acceleration import refresh
from ghostssm.families import family_of, mixers_of
from ghostssm.families.base import Family
from ghostssm.mixer import Mixer
from ghostssm.plan import Plan, Selection


def apply_plan(model: PreTrainedModel, plan: Plan) -> None:
    """Prune a model in place: slice every mixer and write the new state size into the config.

    Raises:
        PlanError: the plan is for another model; nothing was changed.
    """
    mixers = mixers_of(model)
    family = family_of(model.config)
    plan.check_fits({mixer.name: mixer.layout for mixer in mixers}, family.model_type)
    for mixer in mixers:
        prune_mixer(family, mixer, plan.selections[mixer.name], plan.kept_state_size)
    family.set_state_size(model.config, plan.kept_state_size)
    refresh(model)


@contextmanager
def pruned(model: PreTrainedModel, plan: Plan) -> Iterator[None]:
    """Within the context the model is pruned by the plan; afterwards it is as before. Copies only what is sliced."""
    family = family_of(model.config)
    before = mixers_of(model)
    tensors = [_sliced_tensors(mixer) for mixer in before]
    apply_plan(model, plan)
    try:
        yield
    finally:
        for mixer, kept in zip(before, tensors, strict=True):
            _install(family, mixer, mixer.layout.state_size, kept)
        family.set_state_size(model.config, plan.state_size)
        refresh(model)


@torch.inference_mode(False)  # the new weights are ordinary parameters wherever the call stands
def prune_mixer(family: Family, mixer: Mixer, selection: Selection, state_size: int) -> None:
    """Slice one mixer's module in place to the selection, every group padded to ``state_size`` channels."""
    padded = selection.padded(state_size)
    rows, channels = mixer.layout.in_proj_index(padded), mixer.layout.conv_index(padded)
    before = _sliced_tensors(mixer)
    after = _SlicedTensors(
        in_proj_weight=_take(before.in_proj_weight, rows),
        in_proj_bias=None if before.in_proj_bias is None else _take(before.in_proj_bias, rows),
        conv_weight=_take(before.conv_weight, channels),
        conv_bias=None if before.conv_bias is None else _take(before.conv_bias, channels),
    )
    _install(family, mixer, state_size, after)


class _SlicedTensors(NamedTuple):
    """The parameters of a mixer whose shapes depend on the state size."""

    in_proj_weight: Tensor
    in_proj_bias: Tensor | None
    conv_weight: Tensor
    conv_bias: Tensor | None


def _sliced_tensors(mixer: Mixer) -> _SlicedTensors:
    return _SlicedTensors(mixer.in_proj.weight, mixer.in_proj.bias, mixer.conv1d.weight, mixer.conv1d.bias)


def _take(tensor: Tensor, index: Tensor) -> Tensor:
    """The rows ``index`` of a tensor, zeros where it is -1."""
    index = index.to(tensor.device)
    rows = tensor.detach()[index.clamp_min(0)]
    rows[index < 0] = 0
    return rows


def _parameter(tensor: Tensor | None) -> nn.Parameter | None:
    return tensor if tensor is None or isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)


def _install(family: Family, mixer: Mixer, state_size: int, tensors: _SlicedTensors) -> None:
    """Put tensors of a given state size into a mixer's module, and the sizes that go with them."""
    layout = mixer.layout.with_state_size(state_size)
    in_proj, conv1d = mixer.in_proj, mixer.conv1d
    in_proj.register_parameter("weight", _parameter(tensors.in_proj_weight))
    in_proj.register_parameter("bias", _parameter(tensors.in_proj_bias))
    in_proj.out_features = layout.in_proj_rows
    conv1d.register_parameter("weight", _parameter(tensors.conv_weight))
    conv1d.register_parameter("bias", _parameter(tensors.conv_bias))
    conv1d.in_channels = conv1d.out_channels = conv1d.groups = layout.conv_dim
    family.resize(mixer.module, layout)
