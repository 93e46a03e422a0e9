"""Apply decisions to weights: physical slicing, with exact zero channels where groups are uneven.

A padded channel has a zero row in in_proj and zero conv taps and bias, so that B and C are SiLU(0) = 0 there: its state
stays zero and y does not change.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor, nn

from ghostssm.errors import CONVERT, InputError, NumericalError, PlanError
from ghostssm.models.families import Family, check_plain, family_of, mixers_of
from ghostssm.models.families.own import own_model, stock_model
from ghostssm.models.forward import refresh
from ghostssm.models.layout import SSDLayout
from ghostssm.models.mixer import Mixer, Projection
from ghostssm.ops.state_format import Tiers
from ghostssm.plan.decision import Decision, Selection
from ghostssm.plan.plan import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_Sliced: TypeAlias = "Mapping[tuple[str, str], Tensor | None]"
"""The parameters of a mixer whose shapes depend on the state size, by module and name."""


def apply_plan(model: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    """Prune a model and return it: in place, unless the result needs another model class.

    A plan with projections, or with a state size per layer, gives a new model of our own class
    (`ghostssm.models.own_class`) that shares every tensor it does not change; the given model then stays as it is.

    Args:
        model: in memory, as it was when the plan was made.
        plan: of `Calibration.plan`, `smallest_plan` or `Plan.read`.

    Raises:
        PlanError: the plan is for another model; nothing was changed.
        ModelError: there are adapters or quantised layers in the model; nothing was changed.
        NumericalError: numbers of the plan that the model's dtype can't hold; nothing was changed.
    """
    check_plain(model)
    mixers = _fitting_mixers(model, plan)
    if plan.needs_own_class:
        return _converted(model, plan)
    family = family_of(model.config)
    for mixer in mixers:
        decision = plan.decisions[mixer.name]
        prune_mixer(family, mixer, decision.selection, decision.width)
    change_parameters(model, plan.changes)
    for mixer in mixers:
        narrow = mixer.with_state_size(plan.decisions[mixer.name].width)
        if narrow.state_size < plan.kept_state_size:
            prune_mixer(family, narrow, Selection.whole(narrow.layout), plan.kept_state_size)
    family.set_state_size(model.config, plan.kept_state_size)
    refresh(model)
    return model


def pad_state(model: PreTrainedModel, state_size: int) -> PreTrainedModel:
    """Give every layer ``state_size`` channels, the new ones zero: the same logits, for engines without small kernels.

    In place for a stock model; a model of our own class with a state size per layer gives a new stock model, and stays
    as it is.

    Args:
        model: of a stock class, or of our own without projections.
        state_size: at least that of the widest layer.

    Raises:
        InputError: a layer is wider already, projects its state, or has adapters around it; nothing was changed.
    """
    check_plain(model)
    mixers = mixers_of(model)
    widest = max(mixer.layout.state_size for mixer in mixers)
    if state_size < widest:
        raise InputError(
            f"The state can't be padded to {state_size}: it has {widest} channels already; expected {widest} or more."
        )
    if any(mixer.projection is not None for mixer in mixers):
        raise InputError(
            "A projected state can't be padded: its maps after the convolution would remain. "
            "Prune with a method that keeps the stock class, such as output or ghost."
        )
    family = family_of(model.config)
    if family.is_own_class:
        return _padded_stock(model, state_size)
    for mixer in mixers:
        prune_mixer(family, mixer, Selection.whole(mixer.layout), state_size)
    family.set_state_size(model.config, state_size)
    refresh(model)
    return model


@torch.inference_mode(False)
def _padded_stock(model: PreTrainedModel, state_size: int) -> PreTrainedModel:
    """A stock model with the tensors of one of our own class, sharing those that stay as they are."""
    family, tensors = family_of(model.config), dict(model.state_dict())
    for index, block in enumerate(family.blocks(model)):
        mixer = family.mixer(copy.deepcopy(block), index)
        if mixer is not None:
            prune_mixer(family, mixer, Selection.whole(mixer.layout), state_size)
            tensors |= {f"{mixer.name}.{name}": value for name, value in mixer.module.state_dict().items()}
    return stock_model(model, tensors, state_size)


@contextmanager
def pruned(model: PreTrainedModel, plan: Plan) -> Iterator[PreTrainedModel]:
    """Within the context, the model pruned by the plan; afterwards the model is as before.

    Copies only what the plan slices or changes.

    Args:
        model: in memory.
        plan: that fits it.
    """
    mixers = _fitting_mixers(model, plan)
    if plan.needs_own_class:
        yield _converted(model, plan)
        return
    family = family_of(model.config)
    sliced = [_sliced_tensors(mixer) for mixer in mixers]
    changed = {name: model.get_parameter(name) for name in plan.changes}
    try:
        yield apply_plan(model, plan)
    finally:
        for name, parameter in changed.items():
            _set_parameter(model, name, parameter)
        for mixer, tensors in zip(mixers, sliced, strict=True):
            _install(family, mixer, mixer.layout.state_size, tensors)
        family.set_state_size(model.config, plan.state_size)
        refresh(model)


@torch.inference_mode(False)  # the new weights are ordinary parameters wherever the call stands
def prune_mixer(family: Family, mixer: Mixer, selection: Selection, state_size: int) -> None:
    """Slice one mixer's module in place to the selection, every group padded to ``state_size`` channels."""
    index = _index(mixer.layout, selection, state_size)
    before = _sliced_tensors(mixer)
    after = {key: None if value is None else _take(value, index[key[0]]) for key, value in before.items()}
    _install(family, mixer, state_size, after)


def padded_parameters(layout: SSDLayout, parameters: Mapping[str, Tensor], state_size: int) -> dict[str, Tensor]:
    """A mixer's parameters by name, with every group padded to ``state_size`` channels of zeros.

    Args:
        layout: of the parameters. Their names may have a prefix.
    """
    index = _index(layout, Selection.whole(layout), state_size)
    return {name: _take(value, index[part]) for name, value in parameters.items() if (part := _owner(name)) in index}


def _index(layout: SSDLayout, selection: Selection, state_size: int) -> dict[str, Tensor]:
    """The rows that stay of a mixer's in_proj and conv1d; -1 stands for a row of zeros."""
    padded = selection.padded(state_size)
    return {"in_proj": layout.in_proj_index(padded), "conv1d": layout.conv_index(padded)}


def _owner(name: str) -> str:
    """The last part of the name of the module that a parameter is in."""
    return name.rpartition(".")[0].rpartition(".")[2]


@torch.inference_mode(False)
def carry_out(family: Family, mixer: Mixer, decision: Decision) -> None:
    """Slice one mixer's module in place and give it the decision's parameters, a projection as our own class has it."""
    prune_mixer(family, mixer, decision.selection, decision.selection.width)
    change_parameters(mixer.module, decision.changes)
    for name, value in _maps(decision).items():
        mixer.module.register_parameter(name, nn.Parameter(value.to(mixer.in_proj.weight), requires_grad=False))


def _maps(decision: Decision) -> dict[str, Tensor]:
    """The maps of a decision's projection, if it has one, by their names in our own class."""
    maps = decision.projection
    return {} if maps is None else {"B_projection": maps.B, "C_projection": maps.C}


def with_changes_of(plan: Plan, pruned: PreTrainedModel, before: Mapping[str, Tensor]) -> Plan:
    """A plan with what a recovery step changed in a model after the plan was applied to it; the model is used up.

    Args:
        before: the model's parameters as the plan left them.
    """
    changed = [name for name, value in pruned.named_parameters() if not torch.equal(value, before[name])]
    decisions, maps = dict(plan.decisions), set[str]()
    for mixer in mixers_of(pruned):
        decision = plan.decisions[mixer.name]
        if decision.projection is not None and mixer.projection is not None:
            maps |= {f"{mixer.name}.{part}_projection" for part in "BC"}
            learnt = Projection(*(part.detach().clone() for part in (mixer.projection.B, mixer.projection.C)))
            decisions[mixer.name] = replace(decision, projection=learnt)
        elif (width := decision.width) < mixer.state_size:  # padded with zeros, which no plan holds
            kept = Selection((tuple(range(width)),) * mixer.layout.n_groups)
            prune_mixer(family_of(pruned.config), mixer, kept, width)
    values = {name: pruned.get_parameter(name).detach().clone() for name in changed if name not in maps}
    return replace(plan, decisions=decisions, changes={**plan.changes, **values})


@torch.inference_mode(False)
def change_parameters(module: nn.Module, changes: Mapping[str, Tensor]) -> None:
    """Give a module, whose mixers are sliced, new values of parameters, in their dtype and on their device."""
    for name, value in changes.items():
        old = module.get_parameter(name)
        _set_parameter(module, name, nn.Parameter(value.to(old, copy=True), requires_grad=old.requires_grad))


def check_storable(mixer: Mixer, decision: Decision) -> None:
    """Check that the numbers of a decision are finite in the dtypes that a mixer's weights are stored in.

    Raises:
        NumericalError: some are not; names the parameter.
    """
    parameters = dict(mixer.module.named_parameters())
    for name, value in decision.changes.items():
        _check_range(f"{mixer.name}.{name}", value, parameters[name].dtype)
    for name, value in _maps(decision).items():
        _check_range(f"{mixer.name}.{name}", value, mixer.in_proj.weight.dtype)


def _check_range(name: str, value: Tensor, dtype: torch.dtype) -> None:
    if value.is_meta or torch.isfinite(value.to(dtype)).all():  # on the meta device: in the weights already
        return
    stored = str(dtype).removeprefix("torch.")
    raise NumericalError(
        f"{name} of the pruned model has numbers up to {value.abs().max().item():.3g}, beyond "
        f"{torch.finfo(dtype).max:g}, the largest of {stored}, in which the weights are stored. Convert the model "
        f"to a dtype with a wider range first, `{CONVERT}` (or f32), and prune that."
    )


def _fitting_mixers(model: PreTrainedModel, plan: Plan) -> list[Mixer]:
    mixers = mixers_of(model)
    family = family_of(model.config)
    plan.check_fits({mixer.name: mixer.layout for mixer in mixers}, family.model_type)
    faults = [fault for mixer in mixers for fault in _projection_faults(mixer, plan.decisions[mixer.name])]
    faults += _change_faults(model, mixers, plan)
    if faults:
        raise PlanError(
            "The plan's tensors do not fit this model: " + "; ".join(faults) + ". Prune this model to get its plan."
        )
    for mixer in mixers:
        check_storable(mixer, plan.decisions[mixer.name])
    for name, value in plan.changes.items():
        _check_range(name, value, model.get_parameter(name).dtype)
    return mixers


def _change_faults(model: PreTrainedModel, mixers: Sequence[Mixer], plan: Plan) -> list[str]:
    """Reasons why a plan's new parameters don't fit a model whose mixers are sliced."""
    rows: dict[str, int] = {}
    for mixer in mixers:
        layout = mixer.layout.with_state_size(plan.decisions[mixer.name].selection.width)
        for part, count in (("in_proj", layout.in_proj_rows), ("conv1d", layout.conv_dim)):
            rows |= {f"{mixer.name}.{part}.weight": count, f"{mixer.name}.{part}.bias": count}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    faults = []
    for name, value in plan.changes.items():
        if name not in parameters:
            faults.append(f"the model has no parameter {name!r}")
            continue
        first, *rest = parameters[name].shape
        expected = (rows.get(name, first), *rest)
        if tuple(value.shape) != expected:
            faults.append(f"{name} has shape {tuple(value.shape)}, expected {expected}")
    return faults


def _projection_faults(mixer: Mixer, decision: Decision) -> list[str]:
    """Reasons why a decision's projection doesn't fit a mixer that is sliced by its selection."""
    expected = (mixer.layout.n_groups, decision.selection.width, decision.width)
    shapes = (tuple(part.shape) for part in _maps(decision).values())
    return [
        f"a projection of {mixer.name} has shape {shape}, expected {expected}" for shape in shapes if shape != expected
    ]


@torch.inference_mode(False)
def _converted(model: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    """A model of our own class by the plan, sharing the tensors that stay as they are."""
    family, tensors = family_of(model.config), dict(model.state_dict())
    widths: dict[int, int] = {}
    projected: dict[int, int] = {}
    tiers: dict[int, Tiers] = {}
    for index, block in enumerate(family.blocks(model)):
        mixer = family.mixer(copy.deepcopy(block), index)
        if mixer is None:
            continue
        decision = plan.decisions[mixer.name]
        widths[index], projected[index] = decision.selection.width, 0
        carry_out(family, mixer, decision)
        if decision.projection is not None:
            projected[index] = decision.width
        if decision.tiers is not None:
            tiers[index] = decision.tiers
        tensors |= {f"{mixer.name}.{name}": value for name, value in mixer.module.state_dict().items()}
    tensors |= {name: value.to(tensors[name], copy=True) for name, value in plan.changes.items()}
    converted = own_model(model, tensors, widths, projected if plan.is_projected else None, tiers or None)
    converted.generation_config = copy.deepcopy(model.generation_config)
    return converted


def _sliced_tensors(mixer: Mixer) -> _Sliced:
    keys = ((part, name) for part in ("in_proj", "conv1d") for name in ("weight", "bias"))
    return {(part, name): getattr(getattr(mixer, part), name) for part, name in keys}


def _take(tensor: Tensor, index: Tensor) -> Tensor:
    """The rows ``index`` of a tensor, zeros where it is -1."""
    index = index.to(tensor.device)
    rows = tensor.detach()[index.clamp_min(0)]
    rows[index < 0] = 0
    return rows


def _parameter(tensor: Tensor | None) -> nn.Parameter | None:
    return tensor if tensor is None or isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)


def _set_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Replace the parameter with a dotted name."""
    owner, _, last = name.rpartition(".")
    module.get_submodule(owner).register_parameter(last, parameter)


def _install(family: Family, mixer: Mixer, state_size: int, tensors: _Sliced) -> None:
    """Put tensors of a given state size into a mixer's module, and set the sizes that the module notes."""
    layout = mixer.layout.with_state_size(state_size)
    for (part, name), tensor in tensors.items():
        getattr(mixer, part).register_parameter(name, _parameter(tensor))
    conv1d, mixer.in_proj.out_features = mixer.conv1d, layout.in_proj_rows
    conv1d.in_channels = conv1d.out_channels = conv1d.groups = layout.conv_dim
    family.resize(mixer.module, layout)
