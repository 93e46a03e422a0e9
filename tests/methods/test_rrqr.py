"""Strong rank-revealing QR as a choice of channels."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from ghostssm.methods.rrqr import strong_pivots


def volume(gram: np.ndarray, kept: list[int]) -> float:
    return float(np.linalg.det(gram[np.ix_(kept, kept)]))


@pytest.mark.parametrize("seed", range(10))
def test_no_exchange_enlarges_the_volume_much(seed: int) -> None:
    factor = np.random.default_rng(seed).normal(size=(8, 8)) * np.linspace(0.3, 2, 8)
    gram = factor.T @ factor
    kept = strong_pivots(gram, 4)
    assert kept == sorted(set(kept))
    for out in kept:
        for new in set(range(8)) - set(kept):
            swapped = sorted((set(kept) - {out}) | {new})
            assert volume(gram, swapped) <= 1.0202 * volume(gram, kept)
    best = max(volume(gram, list(chosen)) for chosen in combinations(range(8), 4))
    assert volume(gram, kept) >= 0.5 * best


def test_a_copy_of_a_channel_is_not_kept_twice() -> None:
    factor = np.random.default_rng(0).normal(size=(6, 4))
    factor = np.concatenate([10 * factor[:, :1], 10 * factor[:, :1], factor], axis=1)
    kept = strong_pivots(factor.T @ factor, 3)
    assert len({0, 1, 2} & set(kept)) == 1


@pytest.mark.parametrize("count", [1, 5])
def test_degenerate_grams_are_fine(count: int) -> None:
    assert len(strong_pivots(np.zeros((5, 5)), count)) == count


def test_rounding_may_make_eigenvalues_negative() -> None:
    factor = np.random.default_rng(0).normal(size=(2, 6))
    gram = factor.T @ factor - 1e-7 * np.eye(6)
    assert len(strong_pivots(gram, 4)) == 4
