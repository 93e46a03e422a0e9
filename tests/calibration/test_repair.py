"""Closed-form repair of out_proj."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ghostssm.calibration.repair import _slopes, repair_output, repair_skip
from ghostssm.families import mixers_of
from ghostssm.mixer import Mixer, Streams, mixer_output, mixer_streams, normed_output, output_of_streams
from tests.conftest import tiny_model


def prepared(windows: int = 16, **overrides: object) -> tuple[Mixer, list[Streams]]:
    mixer = mixers_of(tiny_model(**overrides))[0]
    hidden = torch.randn(windows, 40, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return mixer, [mixer_streams(mixer, part) for part in hidden.split(4)]


def outputs(mixer: Mixer, batches: list[Streams]) -> list[Tensor]:
    with torch.inference_mode():
        return [output_of_streams(mixer, streams) for streams in batches]


@pytest.mark.parametrize("use_bias", [False, True])
def test_a_weight_that_explains_the_target_is_found(use_bias: bool) -> None:
    mixer, batches = prepared(use_bias=use_bias)
    wanted = outputs(mixer, batches)
    weight = mixer.out_proj.weight
    right = weight.detach().clone()
    weight.data += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    assert repair_output(mixer, batches, wanted) < 1e-4
    torch.testing.assert_close(weight.detach(), right, rtol=0, atol=5e-3)


def test_the_same_fit_as_ridge_regression() -> None:
    """With noise in the target: the solution of the normal equations, pulled towards the weight as it was."""
    mixer, batches = prepared()
    before = mixer.out_proj.weight.detach().double().clone()
    draw = torch.Generator().manual_seed(2)
    wanted = [
        target + 0.5 * torch.randn(target.shape, generator=draw) * target.std() for target in outputs(mixer, batches)
    ]
    wanted = [target * 1.3 for target in wanted]
    assert repair_output(mixer, batches, wanted) < 1
    with torch.inference_mode():
        features = torch.cat([normed_output(mixer, s) for s in batches]).flatten(0, 1).double()
    missing = torch.cat(wanted).flatten(0, 1).double() - features @ before.T
    gram = features.T @ features
    candidates = [
        torch.linalg.solve(gram + ridge * gram.diagonal().mean() * torch.eye(64), features.T @ missing).T
        for ridge in (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
    ]
    change = mixer.out_proj.weight.detach().double() - before
    assert min((change - candidate).abs().max().item() for candidate in candidates) < 1e-4


@pytest.mark.parametrize("windows", [1, 16])
def test_what_can_only_get_worse_is_left_alone(windows: int) -> None:
    mixer, batches = prepared(windows)
    wanted = outputs(mixer, batches)
    if windows > 1:  # noise has nothing to be learnt
        wanted = [target + torch.randn(target.shape, generator=torch.Generator().manual_seed(5)) for target in wanted]
    before = mixer.out_proj.weight.detach().clone()
    change = repair_output(mixer, batches, wanted)
    assert change <= 1
    if windows == 1:
        assert torch.equal(mixer.out_proj.weight, before)


def test_a_skip_that_explains_the_target_is_found() -> None:
    """Up to what the sampled positions and two steps through the norm's curvature leave."""
    mixer, batches = prepared(n_groups=2)
    wanted = outputs(mixer, batches)
    right = mixer.D.detach().clone()
    mixer.D.data += 0.3 * torch.randn(8, generator=torch.Generator().manual_seed(1))
    assert repair_skip(mixer, batches, wanted) < 1e-3
    torch.testing.assert_close(mixer.D.detach(), right, rtol=0, atol=1e-2)


def test_slopes_are_the_outputs_derivative() -> None:
    mixer = mixers_of(tiny_model(n_groups=2).double())[0]
    draw = torch.Generator().manual_seed(0)
    y, x = (torch.randn(2, 5, 8, 8, generator=draw, dtype=torch.float64) for _ in range(2))
    z = torch.randn(2, 5, 64, generator=draw, dtype=torch.float64)
    step = 1e-6 * torch.eye(8, dtype=torch.float64)
    with torch.no_grad():
        moved = [mixer_output(mixer, y + d[:, None] * x, z) - mixer_output(mixer, y - d[:, None] * x, z) for d in step]
        expected = torch.stack([change.flatten() / 2e-6 for change in moved], dim=1)
        torch.testing.assert_close(_slopes(mixer, y, x, z), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("windows", [1, 16])
def test_a_right_skip_stays(windows: int) -> None:
    mixer, batches = prepared(windows)
    before = mixer.D.detach().clone()
    assert repair_skip(mixer, batches, outputs(mixer, batches)) == 1
    assert torch.equal(mixer.D, before)
