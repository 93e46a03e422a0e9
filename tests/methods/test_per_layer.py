"""A state size per layer: what smaller ones cost is measured, and the channels go where it counts."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from ghostssm.calibration.open_block import OpenBlock
from ghostssm.models.families import mixers_of
from ghostssm.plan.decision import Decision, Selection
from ghostssm.plan.plan import Plan
from ghostssm.plan.surgery import apply_plan
from ghostssm.pruning import run as pruning
from ghostssm.pruning.budget import allocate
from ghostssm.pruning.run import Calibration
from ghostssm.text.windows import Windows
from tests.conftest import random_windows, tiny_model


def model_with_loud_layer(layer: int, n_groups: int = 1) -> Any:
    """The others add little to what the embeddings give."""
    model = tiny_model(n_groups=n_groups)
    model.backbone.embeddings.weight.data.normal_(std=10)
    mixers_of(model)[layer].out_proj.weight.data *= 4
    return model


def layer_by_layer(model: Any, windows: Windows) -> list[tuple[Tensor, Tensor, Tensor]]:
    """What each mixer of transformers' own model gets and gives, and the hidden states after its block."""
    inputs, outputs, after = [], [], []
    hooks = [
        hook
        for block in model.backbone.layers
        for hook in (
            block.mixer.register_forward_pre_hook(lambda _, args, kwargs: inputs.append(args[0]), with_kwargs=True),
            block.mixer.register_forward_hook(lambda _, args, output: outputs.append(output)),
            block.register_forward_hook(lambda _, args, output: after.append(output)),
        )
    ]
    with torch.inference_mode():
        model(windows.ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return list(zip(inputs, outputs, after, strict=True))


@pytest.mark.parametrize("n_groups", [1, 2])
def test_curves_are_what_each_layer_loses_of_the_hidden_states_after_it(
    n_groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Magnitude keeps the same channels whatever comes in, so a plan of one size tells what a curve is of."""
    model, windows = model_with_loud_layer(1, n_groups), random_windows(3, 60)
    calibration, found = Calibration(model, windows), []

    def recording(curves: Sequence[Tensor], total: int, multiple: int) -> tuple[int, ...]:
        found.extend(curves)
        return allocate(curves, total, multiple)

    monkeypatch.setattr(pruning, "allocate", recording)
    calibration.plan("magnitude+per-layer", 8)
    assert all(curve.shape == (17,) and curve[16] == 0 for curve in found)
    whole = layer_by_layer(model, windows)
    for size in (0, 1, 2, 4, 8, 12):
        plan = calibration.plan("magnitude", size) if size else nothing_of(model)
        smaller = apply_plan(copy.deepcopy(model), plan)
        for curve, mixer, (given, output, after) in zip(found, mixers_of(smaller), whole, strict=True):
            with torch.inference_mode():
                lost = (mixer.module(given) - output).square().sum() / after.square().sum()
            assert curve[size].item() == pytest.approx(lost.item(), rel=1e-3)


def test_curves_measure_no_decision_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[Decision] = []
    measure = OpenBlock.changes

    def counted(block: OpenBlock, decisions: Sequence[Decision], tokens: int = 60) -> list[float]:
        measured.extend(decisions)
        return measure(block, decisions, tokens)

    monkeypatch.setattr(OpenBlock, "changes", counted)
    Calibration(tiny_model(), random_windows(3, 60)).plan("balanced+per-layer", 8)
    assert len({id(decision) for decision in measured}) == len(measured) > 0


def nothing_of(model: Any) -> Plan:
    names, groups = [mixer.name for mixer in mixers_of(model)], model.config.n_groups
    nothing = dict.fromkeys(names, Decision(Selection(((),) * groups)))
    return Plan(method="test", model_type="mamba2", n_groups=groups, state_size=16, decisions=nothing)


@pytest.mark.parametrize("recipe", ["ghost+per-layer", "output+per-layer", "balanced+per-layer"])
@pytest.mark.parametrize("loud", [0, 1, 2])
def test_the_layer_that_speaks_up_gets_more(recipe: str, loud: int) -> None:
    model, windows = model_with_loud_layer(loud), random_windows(3, 60)
    sizes = Calibration(model, windows).plan(recipe, 6, multiple=1).state_sizes
    assert sum(sizes) == 18
    assert all(sizes[loud] > size for layer, size in enumerate(sizes) if layer != loud)
