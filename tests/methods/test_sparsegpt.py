"""Unstructured zeros, against plain magnitude pruning and least squares."""

from __future__ import annotations

import torch

from ghostssm.methods.sparsegpt import sparse_weight


def test_without_correlation_the_smallest_weights_go_and_the_rest_stays() -> None:
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sparse = sparse_weight(weight, torch.eye(40), 0.5)
    removed = sparse == 0
    assert removed.sum() == 120
    assert weight[removed].abs().max() < weight[~removed].abs().min()
    torch.testing.assert_close(sparse[~removed], weight[~removed])


def test_correlated_inputs_are_made_up_for() -> None:
    draw = torch.Generator().manual_seed(1)
    inputs = torch.randn(500, 10, generator=draw) @ torch.randn(10, 300, generator=draw)
    inputs += 0.1 * torch.randn(500, 300, generator=draw)
    weight = torch.randn(20, 300, generator=draw)
    sparse = sparse_weight(weight, inputs.T @ inputs, 0.5).float()
    assert (sparse == 0).float().mean() >= 0.5 - 1e-3
    threshold = weight.abs().flatten().median()
    plain = weight * (weight.abs() > threshold)

    def error(other: torch.Tensor) -> float:
        return (inputs @ (other - weight).T).square().mean().item()

    assert error(sparse) < 0.1 * error(plain)


def test_inputs_that_are_always_zero_are_no_obstacle() -> None:
    hessian = torch.diag(torch.tensor([1.0, 0.0, 2.0, 3.0]))
    assert torch.isfinite(sparse_weight(torch.ones(2, 4), hessian, 0.25)).all()
