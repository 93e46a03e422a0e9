"""The joint choice of channels, against brute force over all sets."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ghostssm.methods.joint import choose_from_gram, least_error_set
from ghostssm.methods.selection import Cut


def random_gram(size: int, seed: int) -> np.ndarray:
    factor = np.random.default_rng(seed).normal(size=(size, size)) * np.linspace(0.2, 2, size)
    return factor.T @ factor


def error(gram: np.ndarray, removed: np.ndarray) -> float:
    return float(removed @ gram @ removed)


@given(st.integers(0, 10_000), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_no_exchange_improves_and_the_best_set_is_near(seed: int, count: int) -> None:
    gram = random_gram(8, seed)
    gone = least_error_set(gram, [0] * 8, [count])
    assert gone.sum() == count
    found = error(gram, gone)
    best = min(error(gram, np.isin(np.arange(8), chosen)) for chosen in combinations(range(8), count))
    assert best - 1e-9 <= found <= 2 * best + 1e-9
    for i in np.flatnonzero(gone):
        for j in np.flatnonzero(~gone):
            swapped = gone.copy()
            swapped[i], swapped[j] = False, True
            assert error(gram, swapped) >= found - 1e-9


def test_brute_force_is_met_nearly_always() -> None:
    hits = 0
    for seed in range(50):
        gram = random_gram(9, seed)
        best = min(error(gram, np.isin(np.arange(9), chosen)) for chosen in combinations(range(9), 4))
        hits += error(gram, least_error_set(gram, [0] * 9, [4])) <= best + 1e-9
    assert hits >= 45


def test_uncorrelated_channels_go_by_their_energy() -> None:
    energies = np.array([5.0, 1.0, 4.0, 2.0, 3.0])
    assert least_error_set(np.diag(energies), [0] * 5, [2]).tolist() == [False, True, False, True, False]


def test_channels_that_cancel_go_together() -> None:
    """Two loud channels whose sum is nothing are worth less than a quiet one."""
    signals = torch.tensor([[3.0, -3.0, 1.0, 0.9]]) * torch.ones(5, 1)
    signals[:, 2:] += torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    gram = (signals.T @ signals).double()
    assert choose_from_gram(gram, 1, Cut(2)).kept == ((2, 3),)


@pytest.mark.parametrize("groups", ["equal", "pooled"])
def test_groups(groups: str) -> None:
    gram = torch.diag(torch.tensor([9.0, 8, 7, 6, 1, 2, 3, 4])).double()
    kept = choose_from_gram(gram, 2, Cut(2, groups)).kept  # type: ignore[arg-type]
    assert kept == (((0, 1), (2, 3)) if groups == "equal" else ((0, 1, 2, 3), ()))
