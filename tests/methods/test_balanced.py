"""Balanced projection: what the control literature promises of it, and that it is well conditioned."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ghostssm.calibration.samples import OutputSamples
from ghostssm.methods.balanced import balanced_maps, projection_error, refined
from ghostssm.models.mixer import Projection


def gramian(n: int, rank: int, seed: int) -> Tensor:
    factor = torch.randn(n, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return factor @ factor.T


def samples(count: int = 400, n: int = 12, seed: int = 0) -> OutputSamples:
    """States and readouts that are correlated."""
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, 2, 3, 5, generator=draw)
    mix = torch.randn(5, n, generator=draw)
    maps = hidden @ mix + 0.3 * torch.randn(count, 2, 3, n, generator=draw)
    readouts = hidden.mean(2) @ torch.randn(5, n, generator=draw) + 0.3 * torch.randn(count, 2, n, generator=draw)
    return OutputSamples(maps, readouts, torch.zeros(count, 2, 3), torch.zeros(count, 2, n))


def test_all_channels_are_the_identity() -> None:
    B, C, _ = balanced_maps(gramian(9, 12, 0), gramian(9, 12, 1), 9, ridge=1e-12)
    torch.testing.assert_close(C @ B.T, torch.eye(9, dtype=torch.float64), rtol=0, atol=1e-8)


@pytest.mark.parametrize("r", [1, 3, 8])
def test_error_is_the_tail_of_the_hankel_values(r: int) -> None:
    """E (C^T (I - T_C T_B^T) h)^2 for uncorrelated C and h, the least that rank r allows."""
    W_c, W_o = gramian(9, 20, 0), gramian(9, 20, 1)
    B, C, S = balanced_maps(W_c, W_o, r, ridge=1e-14)
    rest = torch.eye(9, dtype=torch.float64) - C @ B.T
    error = (rest @ W_c @ rest.T @ W_o).trace()
    torch.testing.assert_close(error, S[r:].square().sum(), rtol=1e-6, atol=0)


def test_a_change_of_basis_changes_nothing() -> None:
    W_c, W_o = gramian(7, 14, 2), gramian(7, 14, 3)
    basis = torch.randn(7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    inverse = torch.linalg.inv(basis)
    _, _, S = balanced_maps(W_c, W_o, 3, ridge=1e-14)
    _, _, moved = balanced_maps(basis @ W_c @ basis.T, inverse.T @ W_o @ inverse, 3, ridge=1e-14)
    torch.testing.assert_close(moved, S, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("ranks", [(3, 3), (1, 9), (0, 5), (0, 0)])
@pytest.mark.parametrize("r", [1, 5, 9])
def test_rank_deficient_gramians_give_finite_maps(ranks: tuple[int, int], r: int) -> None:
    B, C, S = balanced_maps(gramian(9, ranks[0], 0), gramian(9, ranks[1], 1), r, ridge=1e-6)
    assert all(torch.isfinite(part.float()).all() for part in (B, C, S))


def test_what_lies_in_few_directions_is_kept_exactly() -> None:
    W_c = gramian(9, 3, 0)
    B, C, _ = balanced_maps(W_c, gramian(9, 12, 1), 3, ridge=1e-12)
    rest = torch.eye(9, dtype=torch.float64) - C @ B.T
    assert (rest @ W_c @ rest.T).norm() < 1e-6 * W_c.norm()


def test_projection_error_is_the_definition() -> None:
    data = samples(20)
    maps = Projection(torch.randn(2, 12, 4), torch.randn(2, 12, 4))
    total = 0.0
    for t in range(20):
        change = torch.zeros(3)
        for g in range(2):
            readout = data.readouts[t, g]
            change += data.maps[t, g] @ (readout - maps.B[g] @ (maps.C[g].T @ readout))
        total += change.square().sum().item()
    assert projection_error(data, maps).item() == pytest.approx(total / 20, rel=1e-4)


def test_refining_pays_on_held_out_samples_and_never_costs() -> None:
    fit, held_out = samples(4000).split(0.2)
    pairs = zip(fit.controllability(), fit.observability(), strict=True)
    parts = [balanced_maps(W_c, W_o, 3, ridge=1e-6) for W_c, W_o in pairs]
    start = Projection(*(torch.stack([part[i] for part in parts]).float() for i in (0, 1)))
    with torch.inference_mode():
        better = refined(start, fit, held_out)
        assert projection_error(held_out, better) < 0.97 * projection_error(held_out, start)
        exact = Projection(*(torch.eye(12).expand(2, 12, 12) for _ in range(2)))
        assert projection_error(held_out, refined(exact, fit, held_out)) <= 1e-9
