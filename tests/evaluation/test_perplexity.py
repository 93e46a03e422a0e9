"""Losses against transformers' own."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from ghostssm.calibration.blocks import blocks_of
from ghostssm.errors import NumericalError
from ghostssm.evaluation import Evaluation, evaluate
from ghostssm.models.forward import accelerate, restore
from ghostssm.ops.state_format import StateStorage
from tests.conftest import random_windows, tiny_model


@pytest.mark.parametrize("n_groups", [1, 2])
def test_losses_equal_those_of_transformers(n_groups: int) -> None:
    model, windows = tiny_model(n_groups=n_groups), random_windows(5, 600)
    found = evaluate(model, windows)
    with torch.inference_mode():
        expected = [model(input_ids=ids[None], labels=ids[None]).loss.item() for ids in windows.ids]
    torch.testing.assert_close(found.losses, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    assert found.perplexity == pytest.approx(math.exp(sum(expected) / 5), rel=1e-5)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_the_loss_of_a_rounded_state_is_that_of_decoding(rounding: str) -> None:
    """Token by token through the cache; the same in batches of other sizes, and block by block."""
    model, windows = tiny_model(n_groups=2), random_windows(3, 40)
    storage = StateStorage.of("int8", rounding, seed=3)
    found = evaluate(model, windows, storage=storage)
    accelerate(model, state_dtype="int8", state_rounding=rounding, seed=3)
    cache, losses = None, torch.zeros(3, dtype=torch.float64)
    with torch.inference_mode():
        for position in range(39):
            output = model(input_ids=windows.ids[:, position : position + 1], cache_params=cache, use_cache=True)
            cache = output.cache_params
            losses += (
                F.cross_entropy(output.logits[:, -1].double(), windows.ids[:, position + 1], reduction="none") / 39
            )
    restore(model)
    assert (found.losses - evaluate(model, windows).losses).abs().max() > 1e-4
    torch.testing.assert_close(found.losses, losses, rtol=0, atol=2e-5)
    by_block = evaluate(blocks_of(model), windows, storage=storage)
    torch.testing.assert_close(by_block.losses, found.losses, rtol=0, atol=2e-5)


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
