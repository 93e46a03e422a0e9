"""Every part of a method or recipe pays for the whole model: with it the logits are closer than without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ghostssm.methods import balanced
from ghostssm.models.families import mixers_of
from ghostssm.plan.surgery import pruned
from ghostssm.pruning.run import Calibration
from ghostssm.recovery import repair
from tests.conftest import random_windows, tiny_model


@torch.no_grad()
def model_that_reads_what_it_writes(seed: int) -> Any:
    """Decay is fast and C is B: states and readouts are correlated, and the state does what D could do."""
    model = tiny_model(seed, num_hidden_layers=2)
    for mixer in mixers_of(model):
        layout, conv = mixer.layout, mixer.conv1d
        assert conv.bias is not None
        mixer.A_log.add_(4)
        mixer.in_proj.weight[layout.in_proj_C] = mixer.in_proj.weight[layout.in_proj_B]
        conv.weight[layout.conv_C] = conv.weight[layout.conv_B]
        conv.bias[layout.conv_C] = conv.bias[layout.conv_B]
    return model


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(ids, use_cache=False).logits
        return found


def distance(calibration: Calibration, recipe: str) -> float:
    """Mean squared change of the logits on windows that calibrated nothing."""
    model, ids = calibration.model, random_windows(8, 100, seed=1).ids
    whole = logits(model, ids)
    with pruned(model, calibration.plan(recipe, 4)) as smaller:
        return (logits(smaller, ids) - whole).square().mean().item()


@pytest.mark.parametrize("seed", [0, 2])
def test_refining_the_projection_pays(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calibration = Calibration(model_that_reads_what_it_writes(seed), random_windows(16, 100))
    refined = distance(calibration, "balanced")
    monkeypatch.setattr(balanced, "refined", lambda start, *_: start)
    assert refined < 0.8 * distance(calibration, "balanced")


@pytest.mark.parametrize(("part", "other"), [("repair_skip", "repair_output"), ("repair_output", "repair_skip")])
@pytest.mark.parametrize("seed", [0, 2])
def test_each_repair_pays_alone(part: str, other: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calibration = Calibration(model_that_reads_what_it_writes(seed), random_windows(16, 100))
    monkeypatch.setattr(repair, other, lambda *_: 1.0)
    repaired = distance(calibration, "ghost+repair")
    monkeypatch.setattr(repair, part, lambda *_: 1.0)
    unrepaired = distance(calibration, "ghost+repair")
    assert repaired < 0.95 * unrepaired
    assert unrepaired == distance(calibration, "ghost")


@pytest.mark.parametrize(("method", "state_size"), [("sparsegpt", 4), ("sparsegpt-all", 4), ("sparsegpt", 10)])
def test_the_share_of_zeros_is_what_the_state_would_lose(method: str, state_size: int) -> None:
    model, windows = tiny_model(n_groups=2), random_windows(2, 60)
    with pruned(model, Calibration(model, windows).plan(method, state_size)):
        for mixer in mixers_of(model):
            rows = slice(mixer.layout.in_proj_B.start, mixer.layout.in_proj_C.stop)
            weight = mixer.in_proj.weight
            part = weight if method == "sparsegpt-all" else weight[rows]
            assert (part == 0).sum() == round((1 - state_size / 16) * part.numel())
            assert (weight == 0).sum() == (part == 0).sum()
