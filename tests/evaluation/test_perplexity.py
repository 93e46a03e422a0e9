"""Losses against transformers' own."""

from __future__ import annotations

import math

import pytest
import torch

from ghostssm.errors import NumericalError
from ghostssm.evaluation import Evaluation, evaluate
from tests.conftest import random_windows, tiny_model


@pytest.mark.parametrize("n_groups", [1, 2])
def test_losses_equal_those_of_transformers(n_groups: int) -> None:
    model, windows = tiny_model(n_groups=n_groups), random_windows(5, 600)
    found = evaluate(model, windows)
    with torch.inference_mode():
        expected = [model(input_ids=ids[None], labels=ids[None]).loss.item() for ids in windows.ids]
    torch.testing.assert_close(found.losses, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    assert found.perplexity == pytest.approx(math.exp(sum(expected) / 5), rel=1e-5)


def test_bits_per_byte() -> None:
    evaluation = Evaluation(torch.tensor([math.log(8)], dtype=torch.float64), bytes_per_token=1.5)
    assert evaluation.bits_per_byte == pytest.approx(2.0)


def test_excess_is_paired() -> None:
    dense = Evaluation(torch.tensor([1.0, 5.0, 9.0], dtype=torch.float64), 1.0)
    other = Evaluation(torch.tensor([1.1, 5.2, 9.3], dtype=torch.float64), 1.0)
    excess = other.excess_over(dense)
    assert excess.mean == pytest.approx(0.2)
    assert excess.standard_error == pytest.approx(0.1 / math.sqrt(3))


def test_the_error_of_correlated_windows_is_that_of_repeated_draws() -> None:
    """An autoregressive series, whose mean's deviation over many draws is known."""
    draws, count, memory = 400, 256, 0.6
    generator = torch.Generator().manual_seed(0)
    values = torch.zeros(draws, count, dtype=torch.float64)
    for place in range(1, count):
        fresh = torch.randn(draws, generator=generator, dtype=torch.float64)
        values[:, place] = memory * values[:, place - 1] + fresh
    true = values.mean(1).std().item()
    mean_error = {
        consecutive: sum(Evaluation(row, 1.0, consecutive).standard_error for row in values) / draws
        for consecutive in (True, False)
    }
    assert mean_error[True] == pytest.approx(true, rel=0.2)
    assert mean_error[False] < 0.6 * true


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    model = tiny_model()
    model.backbone.norm_f.weight.data.fill_(float("inf"))
    with pytest.raises(NumericalError):
        evaluate(model, random_windows(1, 20))


def test_perplexity_may_be_infinite() -> None:
    assert Evaluation(torch.tensor([800.0]), 1.0).perplexity == float("inf")
