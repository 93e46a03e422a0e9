"""Dividing a state over layers, against trying every division."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ghostssm.pruning.budget import allocate


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


@given(
    st.lists(st.lists(st.floats(0, 10), min_size=13, max_size=13), min_size=1, max_size=4),
    st.integers(1, 60),
    st.integers(1, 8),
)
def test_of_any_curves_all_of_the_total_is_spent_and_no_more(
    errors: list[list[float]], total: int, multiple: int
) -> None:
    """Curves that are not convex, nor even falling."""
    curves = [torch.tensor(layer, dtype=torch.float64) for layer in errors]
    sizes = allocate(curves, total, multiple)
    assert all(multiple <= size <= 12 and (size % multiple == 0 or size == 12) for size in sizes)
    assert sum(sizes) <= max(total, multiple * len(curves))
    steps = [min(multiple, 12 - size) for size in sizes if size < 12]
    assert all(sum(sizes) + step > total for step in steps)


def test_a_step_that_pays_only_later_is_not_seen() -> None:
    """A curve that is flat at first gets what the others have no use for, and the total is spent all the same."""
    hidden = torch.tensor([9.0, 9.0, 9.0, 0.0, 0.0])
    plain = convex_curve([4.0, 3.0, 2.0, 1.0])
    assert allocate([hidden, plain], 4, 1) == (1, 3)
    assert allocate([hidden, plain], 6, 1) == (2, 4)
    assert allocate([hidden, plain], 7, 1) == (3, 4)
