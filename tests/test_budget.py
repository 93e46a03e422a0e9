"""Dividing a state over layers, against trying every division."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ghostssm.budget import allocate


def convex_curve(gains: list[float]) -> torch.Tensor:
    """Errors with 0, 1, ... channels left, from what each next channel takes off."""
    ordered = torch.tensor(sorted(gains, reverse=True), dtype=torch.float64)
    return torch.cat([ordered.flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)])


@given(
    st.lists(st.lists(st.floats(0, 10), min_size=6, max_size=6), min_size=2, max_size=3),
    st.integers(1, 18),
)
def test_no_division_is_better(gains: list[list[float]], total: int) -> None:
    curves = [convex_curve(layer) for layer in gains]
    sizes = allocate(curves, total, 1)
    if total < len(curves):
        assert sizes == (1,) * len(curves)
        return
    assert sum(sizes) == min(total, 6 * len(curves))
    best = min(
        sum(curve[size].item() for curve, size in zip(curves, division, strict=True))
        for division in product(range(1, 7), repeat=len(curves))
        if sum(division) <= total
    )
    assert sum(c[s].item() for c, s in zip(curves, sizes, strict=True)) == pytest.approx(best)


def test_multiples() -> None:
    curves = [convex_curve([10.0] * 20), convex_curve([1.0] * 20), convex_curve([0.1] * 20)]
    assert allocate(curves, 36, 8) == (20, 8, 8)
    assert allocate(curves, 60, 8) == (20, 20, 20)
