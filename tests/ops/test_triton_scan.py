"""The kernels over sequences against the definitions in float64, on fresh inputs in every run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from ghostssm.ops import gpu
from ghostssm.ops.energy import channel_energies, channel_energies_reference
from ghostssm.ops.reading import read_states
from ghostssm.ops.ssd import ssd, ssd_chunked, ssd_reference
from tests.ops.test_reading import read_states_reference
from tests.ops.test_scan_gradient import gradients

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
    for form in ("ssd_chunked", "ChunkedScan"):
        monkeypatch.setattr(f"ghostssm.ops.ssd.{form}", None)
    monkeypatch.setattr("ghostssm.ops.reading.read_states_chunked", None)
    monkeypatch.setattr(gpu.kernels("scan"), "STRETCH", 4)
    monkeypatch.setattr(gpu.kernels("chunks"), "CHUNK", 16)
    monkeypatch.setattr(gpu.kernels("chunks"), "_HEADS", 2)
    return triton_device


def streams(
    device: str, groups: int, heads: int, p: int, n: int, length: int, initial: bool, b: int = 2
) -> dict[str, Any]:
    """As a mixer has them: x, B and C are parts of one tensor, with NaN before and after it."""
    inner = heads * p
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


GRADIENTS = [
    # sequences, groups, heads, p, n, tokens, initial state and skip, of x, B and C
    (1, 1, 3, 8, 70, 5, True, torch.float32),
    (2, 2, 2, 5, 20, 17, True, torch.float32),
    (1, 4, 4, 16, 1, 7, False, torch.float32),
    (1, 1, 2, 70, 20, 16, True, torch.float32),
    (1, 1, 2, 3, 128, 11, False, torch.bfloat16),
    (1, 2, 4, 8, 16, 1, True, torch.bfloat16),
]


@pytest.mark.parametrize(("b", "groups", "heads", "p", "n", "length", "initial", "dtype"), GRADIENTS)
def test_gradients(
    fused: str, b: int, groups: int, heads: int, p: int, n: int, length: int, initial: bool, dtype: torch.dtype
) -> None:
    s = narrowed(streams(fused, groups, heads, p, n, length, initial, b), dtype)
    s["D"] = torch.randn(heads).to(fused) if initial else None
    found = gradients(ssd, s)
    check(found, gradients(ssd_chunked, in_float64(s)), 5e-6 if dtype == torch.float32 else 5e-3)
    assert all(gradient.dtype == s[name].dtype for name, gradient in found.items())


def check(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 5e-6) -> None:
    """A's gradients are sums over a sequence that may come to nothing: the sizes of what is summed count too."""
    for name, gradient in expected.items():
        size = max(gradient.norm(), expected["dt"].norm()) if name == "A" else gradient.norm()
        assert (found[name].double().cpu() - gradient).norm() <= tolerance * size, name


def narrowed(s: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """With x, B and C in a dtype; in their own these stay parts of one tensor."""
    return {name: part.to(dtype) if name in ("x", "B", "C") else part for name, part in s.items()}


@pytest.mark.parametrize("of", ["y", "state"])
def test_gradients_of_one_of_the_two_results(fused: str, of: str) -> None:
    s = streams(fused, 1, 2, 8, 5, 18, True, b=1)
    check(gradients(ssd, s, of), gradients(ssd_chunked, in_float64(s), of))


def test_gradients_where_nothing_lasts(fused: str) -> None:
    """As `test_scan_gradient` has it: the decay's gradient is 1e-6 of what a token writes and reads itself."""
    s = streams(fused, 1, 1, 8, 16, 20, False, b=1)
    s |= {"A": torch.full_like(s["A"], -14.0), "dt": torch.ones_like(s["dt"])}
    expected, found = gradients(ssd_chunked, in_float64(s), "y")["A"], gradients(ssd, s, "y")["A"]
    torch.testing.assert_close(found.double().cpu(), expected, rtol=1e-4, atol=0)


def test_gradients_are_the_same_bits_again(fused: str) -> None:
    s = streams(fused, 1, 2, 8, 5, 3, True, b=1)
    first, second = gradients(ssd, s), gradients(ssd, s)
    assert all(torch.equal(first[name], second[name]) for name in first)


READINGS = [
    # sequences, groups, heads, p, n, tokens, initial state, positions, directions
    (1, 1, 3, 8, 33, 37, True, range(1, 37, 17), 9),
    (2, 2, 4, 5, 16, 18, False, [15, 16], 5),
    (1, 1, 1, 70, 128, 18, True, [17], 70),
    (1, 4, 4, 16, 1, 1, True, [0], 1),
]


@pytest.mark.parametrize(("b", "groups", "heads", "p", "n", "length", "initial", "positions", "directions"), READINGS)
def test_states_read_at_some_tokens(
    fused: str,
    b: int,
    groups: int,
    heads: int,
    p: int,
    n: int,
    length: int,
    initial: bool,
    positions: Sequence[int],
    directions: int,
) -> None:
    s = streams(fused, groups, heads, p, n, length, initial, b)
    s["u"] = torch.randn(b, len(positions), heads, directions, p).to(fused)
    exact, names = in_float64(s), ("x", "dt", "A", "B", "u")
    state = exact["initial_state"] if initial else torch.zeros(b, heads, p, n, dtype=torch.float64)
    expected = read_states_reference(*(exact[name] for name in names), positions, state)
    found = read_states(*(s[name] for name in names), positions, s["initial_state"])
    for part, reference in zip(found, expected, strict=True):
        assert part.shape == reference.shape
        assert (part.double().cpu() - reference).norm() <= 2e-6 * reference.norm()
