"""Costs of leaving out and rounding state channels: by brute force, and compiled loops against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ghostssm.ops import compiled
from ghostssm.ops.rounding_costs import rounding_costs, rounding_costs_reference


def test_the_costs_are_those_of_their_definition(fresh_seed: int) -> None:
    """By brute force in float64: a channel left out of y, and one rounding error at a time, carried to the end."""
    b, length, h, p, g, n = 2, 5, 4, 3, 2, 6
    x, dt = torch.randn(b, length, h, p, dtype=torch.float64), torch.rand(b, length, h, dtype=torch.float64)
    B, C = torch.randn(2, b, length, g, n, dtype=torch.float64)
    A, weight = -torch.rand(h, dtype=torch.float64), torch.rand(b, length, h, p, dtype=torch.float64)
    left_out, rounded = rounding_costs(x, dt, A, B, C, weight)
    wrote, read = (part.repeat_interleave(h // g, dim=2) for part in (B, C))
    states, state = [], torch.zeros(b, h, p, n, dtype=torch.float64)
    for t in range(length):
        decay = torch.exp(dt[:, t] * A)[..., None, None]
        state = decay * state + (dt[:, t, :, None] * x[:, t])[..., None] * wrote[:, t, :, None]
        states.append(state)

    def changed(errors: Tensor, t: int) -> Tensor:
        return ((errors * read[:, t, :, None]).square() * weight[:, t, ..., None]).sum((0, 2))

    torch.testing.assert_close(left_out, sum(changed(states[t], t) for t in range(length)))
    expected = torch.zeros(h, n, dtype=torch.float64)
    for start in range(length):
        error = states[start].abs().amax(-1, keepdim=True).expand(b, h, p, n)
        for t in range(start + 1, length):
            error = error * torch.exp(dt[:, t] * A)[..., None, None]
            expected += changed(error, t) / 12
    torch.testing.assert_close(rounded, expected)


@pytest.mark.skipif(not compiled.HAS_KERNELS, reason="numba is not installed")
@pytest.mark.parametrize(("groups", "n", "p"), [(1, 9, 5), (4, 32, 40)])
def test_compiled_loops_are_the_reference(groups: int, n: int, p: int) -> None:
    torch.manual_seed(n)
    x, dt, A = torch.randn(2, 7, 4, p), torch.rand(2, 7, 4), -torch.rand(4)
    B, C = torch.randn(2, 2, 7, groups, n)
    given = (x, dt, A, B, C, torch.rand(2, 7, 4, p))
    for found, expected in zip(rounding_costs(*given), rounding_costs_reference(*given), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
