"""The kernels over sequences against the definitions in float64, on fresh inputs in every run."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ghostssm.ops import gpu
from ghostssm.ops.energy import channel_energies, channel_energies_reference
from ghostssm.ops.ssd import ssd, ssd_reference

SHAPES = [
    # groups, heads, p, n, tokens, initial state
    (1, 2, 8, 128, 6, False),
    (2, 2, 16, 33, 9, True),
    (4, 4, 5, 16, 5, True),
    (1, 1, 40, 96, 8, True),
    (8, 8, 8, 5, 1, False),
]
shapes = pytest.mark.parametrize(("groups", "heads", "p", "n", "length", "initial"), SHAPES)


@pytest.fixture
def fused(triton_device: str, fresh_seed: int, _poisoned: None, monkeypatch: pytest.MonkeyPatch) -> str:
    """The device; the test fails if the call is not served by the kernels."""
    monkeypatch.setattr("ghostssm.ops.compiled.kernels", None)
    monkeypatch.setattr("ghostssm.ops.energy.channel_energies_chunked", None)
    monkeypatch.setattr("ghostssm.ops.ssd.ssd_chunked", None)
    monkeypatch.setattr(gpu.scan_kernels(), "STRETCH", 4)
    return triton_device


def streams(device: str, groups: int, heads: int, p: int, n: int, length: int, initial: bool) -> dict[str, Any]:
    """As a mixer has them: x, B and C are parts of one tensor, with NaN before and after it."""
    b, inner = 2, heads * p
    buffer = torch.full((b, length + 2, inner + 2 * groups * n), math.nan, device=device)
    xBC = buffer[:, 1:-1]
    xBC.copy_(torch.randn(xBC.shape))
    x, B, C = xBC.split([inner, groups * n, groups * n], dim=2)
    dt = torch.full((b, length + 2, heads), math.nan, device=device)
    dt[:, 1:-1] = torch.rand(b, length, heads)
    return {
        "x": x.unflatten(2, (heads, p)),
        "dt": dt[:, 1:-1],
        "A": (-torch.rand(heads) * 2).to(device),
        "B": B.unflatten(2, (groups, n)),
        "C": C.unflatten(2, (groups, n)),
        "initial_state": torch.randn(b, heads, p, n).to(device) if initial else None,
    }


def in_float64(s: dict[str, Any]) -> dict[str, Any]:
    return {name: part.double().cpu() if isinstance(part, Tensor) else part for name, part in s.items()}


@shapes
def test_energies(fused: str, groups: int, heads: int, p: int, n: int, length: int, initial: bool) -> None:
    s = streams(fused, groups, heads, p, n, length, initial)
    expected, found = channel_energies_reference(**in_float64(s)), channel_energies(**s)
    for name in ("output", "state", "readout"):
        torch.testing.assert_close(getattr(found, name).cpu(), getattr(expected, name), rtol=1e-5, atol=0)


@shapes
def test_outputs_and_final_state(
    fused: str, groups: int, heads: int, p: int, n: int, length: int, initial: bool
) -> None:
    s = streams(fused, groups, heads, p, n, length, initial)
    s["D"] = torch.randn(heads).to(fused) if groups > 1 else None
    for expected, found in zip(ssd_reference(**in_float64(s)), ssd(**s), strict=True):
        assert (found.double().cpu() - expected).norm() < 2e-6 * expected.norm()


def test_a_bfloat16_state_is_taken_on(fused: str) -> None:
    s = streams(fused, 2, 2, 8, 8, 3, True)
    s["initial_state"] = s["initial_state"].bfloat16()
    for expected, found in zip(ssd_reference(**in_float64(s)), ssd(**s), strict=True):
        assert (found.double().cpu() - expected).norm() < 2e-6 * expected.norm()


def test_energies_stay_close_where_decay_is_slow_and_inputs_are_correlated(fused: str) -> None:
    s = streams(fused, 1, 1, 8, 16, 100, False)
    s["A"] = torch.full_like(s["A"], -1e-3)
    s["x"] = s["x"][:, :1] * (-1.0) ** torch.arange(100, device=fused)[None, :, None, None]
    expected, found = channel_energies_reference(**in_float64(s)), channel_energies(**s)
    torch.testing.assert_close(found.output.cpu(), expected.output, rtol=1e-4, atol=0)
