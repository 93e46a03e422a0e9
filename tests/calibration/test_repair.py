"""Closed-form repair of out_proj."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ghostssm.models.families import mixers_of
from ghostssm.models.mixer import Mixer, Streams, mixer_output, mixer_streams, normed_output, output_of_streams
from ghostssm.recovery import repair
from ghostssm.recovery.repair import _slopes, repair_output, repair_skip
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


def with_noise(targets: list[Tensor], amount: float, seed: int = 2) -> list[Tensor]:
    """The amount is in units of the targets' standard deviation."""
    draw = torch.Generator().manual_seed(seed)
    return [target + amount * target.std() * torch.randn(target.shape, generator=draw) for target in targets]


def ridge_regression(features: Tensor, missing: Tensor, ridge: float) -> Tensor:
    """(d, k), the change of the weight that the normal equations give."""
    features, missing = features.flatten(0, 1), missing.flatten(0, 1)
    gram = features.T @ features
    penalty = ridge * gram.diagonal().mean() * torch.eye(len(gram))
    return torch.linalg.solve(gram + penalty, features.T @ missing).T


@pytest.mark.parametrize(("noise", "best"), [(0.01, 1e-4), (0.1, 1e-2), (0.3, 1e-1), (0.5, 1.0), (2.0, 10.0)])
def test_ridge_regression_with_the_ridge_that_does_best_on_held_out_windows(noise: float, best: float) -> None:
    """The more noise, the more the weight is pulled towards what it was; the fit itself is to all windows."""
    mixer, batches = prepared()
    before = mixer.out_proj.weight.detach().double().clone()
    wanted = with_noise([1.3 * target for target in outputs(mixer, batches)], noise)
    with torch.inference_mode():
        features = torch.cat([normed_output(mixer, s) for s in batches]).double()
    missing = torch.cat(wanted).double() - features @ before.T
    apart = torch.arange(16) % 8 == 1

    def left(ridge: float) -> float:
        change = ridge_regression(features[~apart], missing[~apart], ridge)
        return ((missing - features @ change.T)[apart].square().sum() / missing[apart].square().sum()).item()

    errors = {ridge: left(ridge) for ridge in (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)}
    assert min(errors, key=lambda ridge: errors[ridge]) == best
    assert repair_output(mixer, batches, wanted) == pytest.approx(errors[best], rel=1e-4)
    change = mixer.out_proj.weight.detach().double() - before
    torch.testing.assert_close(change, ridge_regression(features, missing, best), rtol=0, atol=1e-5)


@pytest.mark.parametrize("noise", [0.1, 0.5, 2.0])
def test_windows_that_no_fit_has_seen_gain_too(noise: float) -> None:
    mixer, batches = prepared()
    fresh = mixer_streams(mixer, torch.randn(32, 40, 32, generator=torch.Generator().manual_seed(9)))
    right = [1.3 * target for target in outputs(mixer, [*batches, fresh])]

    def error() -> float:
        return (outputs(mixer, [fresh])[0] - right[-1]).square().mean().item()

    before = error()
    repair_output(mixer, batches, with_noise(right[:-1], noise))
    assert error() < before


@pytest.mark.parametrize("windows", [1, 16])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_noise_is_not_learnt_and_one_window_teaches_nothing(windows: int, seed: int) -> None:
    mixer, batches = prepared(windows)
    before = mixer.out_proj.weight.detach().clone()
    assert repair_output(mixer, batches, with_noise(outputs(mixer, batches), 5.0, seed)) == 1
    assert torch.equal(mixer.out_proj.weight, before)


def test_a_skip_that_explains_the_target_is_found() -> None:
    """Up to what the sampled positions and two steps through the norm's curvature leave."""
    mixer, batches = prepared(n_groups=2)
    wanted = outputs(mixer, batches)
    right = mixer.D.detach().clone()
    mixer.D.data += 0.3 * torch.randn(8, generator=torch.Generator().manual_seed(1))
    assert repair_skip(mixer, batches, wanted) < 1e-3
    torch.testing.assert_close(mixer.D.detach(), right, rtol=0, atol=1e-2)


def test_a_skip_is_fitted_to_all_depths_of_many_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where one token of each would be enough: at the first ones D has nothing to weigh here."""
    monkeypatch.setattr(repair, "_SKIP_TOKENS", 16)
    mixer, batches = prepared(16)
    batches = [replace(s, x=torch.cat([torch.zeros_like(s.x[:, :1]), s.x[:, 1:]], dim=1)) for s in batches]
    wanted = outputs(mixer, batches)
    mixer.D.data += 0.3 * torch.randn(8, generator=torch.Generator().manual_seed(1))
    assert repair_skip(mixer, batches, wanted) < 1e-2


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
