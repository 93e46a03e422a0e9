"""Gradients through a rounded state: of the reference against autograd with constant errors, of the loop against it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ghostssm.ops import compiled
from ghostssm.ops.ssd import ssd_step
from ghostssm.ops.state_format import FORMATS, StateFormat, StateStorage, dequantise, quantise
from ghostssm.ops.stored import stored_scan_reference
from ghostssm.ops.straight_through import straight_through_scan, straight_through_scan_reference

ROUNDED = [each for each in FORMATS.values() if each.name != "float32"]
formats = pytest.mark.parametrize("form", ROUNDED, ids=lambda form: form.name)
needs_numba = pytest.mark.skipif(not compiled.HAS_KERNELS, reason="numba is not installed")


def streams(groups: int, length: int, p: int, n: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x, dt, A, B, C and D of two sequences and four heads, which keep what they read for 2 to 50 tokens."""
    torch.manual_seed(n)
    b, h = 2, 4
    A = -torch.tensor([0.04, 0.2, 0.5, 1.0])
    drawn = [torch.randn(b, length, h, p), torch.rand(b, length, h), A]
    drawn += [torch.randn(b, length, groups, n), torch.randn(b, length, groups, n), torch.randn(h)]
    return [part.to(dtype) for part in drawn]


def gradients(scan: Any, storage: StateStorage, parts: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """y, and the gradients of uneven weights on it."""
    leaves = [part.detach().clone().requires_grad_() for part in parts]
    y = scan(storage, *leaves)
    weights = torch.cos(torch.arange(y.numel(), dtype=y.dtype)).view_as(y)
    return y.detach(), list(torch.autograd.grad((y * weights).sum(), leaves))


@formats
def test_the_reference_is_the_stored_scan(form: StateFormat) -> None:
    parts, storage = streams(2, 20, 5, 7), StateStorage(form)
    expected, _ = stored_scan_reference(quantise(torch.zeros(2, 4, 5, 7), storage), storage, *parts)
    torch.testing.assert_close(straight_through_scan_reference(storage, *parts), expected)


def test_rounding_is_the_identity_to_gradients() -> None:
    """The gradients are those of the recurrence to which what rounding adds is given as constants; in float64."""
    form, storage = FORMATS["int4"], StateStorage(FORMATS["int4"])
    parts = streams(2, 12, 3, 4, torch.float64)
    errors: list[Tensor] = []
    state = torch.zeros(2, 4, 3, 4, dtype=torch.float64)
    for t in range(12):
        _, state = ssd_step(state, *(part[:, t] if part.ndim > 1 else part for part in parts))
        errors.append(dequantise(quantise(state, storage), form, 3, 4).double() - state)
        state = state + errors[-1]

    def with_errors(_: StateStorage, *leaves: Tensor) -> Tensor:
        state, outputs = torch.zeros(2, 4, 3, 4, dtype=torch.float64), []
        for t, error in enumerate(errors):
            y, state = ssd_step(state, *(part[:, t] if part.ndim > 1 else part for part in leaves))
            state = state + error
            outputs.append(y)
        return torch.stack(outputs, dim=1)

    expected, found = gradients(with_errors, storage, parts), gradients(straight_through_scan, storage, parts)
    torch.testing.assert_close(found, expected)


@needs_numba
def test_gradients_do_not_depend_on_threads() -> None:
    parts, storage = streams(2, 30, 20, 16), StateStorage(FORMATS["int8"])
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(gradients(straight_through_scan, storage, parts)[1])
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *found))


@formats
@needs_numba
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize(("groups", "length", "p", "n"), [(1, 40, 9, 16), (2, 33, 5, 7), (4, 1, 20, 33)])
def test_the_compiled_loop_is_the_reference(
    form: StateFormat, rounding: str, groups: int, length: int, p: int, n: int
) -> None:
    parts = streams(groups, length, p, n)
    storage = StateStorage.of(form, rounding, seed=7).at(2, 0)
    expected, wanted = gradients(straight_through_scan_reference, storage, parts)
    y, found = gradients(straight_through_scan, storage, parts)
    # Sums in another order may put a number on the edge of two levels to either side; the state differs by one then.
    assert (y - expected).norm() < 1e-2 * expected.norm()
    for name, one, other in zip(("x", "dt", "A", "B", "C", "D"), found, wanted, strict=True):
        assert (one - other).norm() <= 1e-2 * other.norm(), name
