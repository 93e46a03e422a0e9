"""Accelerated models under training: their gradients are those of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ghostssm import accelerate
from ghostssm.ops import compiled
from tests.conftest import VOCABULARY, tiny_model
from tests.families.tiny import float64_throughout, tiny_hybrid

MODELS: dict[str, Any] = {
    "mamba2": lambda: tiny_model(n_groups=2, use_bias=True),
    "bamba": lambda: tiny_hybrid("bamba"),
    "falcon_h1-norm": lambda: tiny_hybrid("falcon_h1-norm"),
}


@pytest.fixture(params=["compiled", "chunks"], autouse=True)
def _form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "chunks":
        monkeypatch.setattr(compiled, "kernels", None)
    elif not compiled.HAS_KERNELS:
        pytest.skip("numba is not installed")


def gradients(model: Any, mask: Tensor | None = None) -> dict[str, Tensor]:
    ids = torch.randint(1, VOCABULARY, (2, 70), generator=torch.Generator().manual_seed(3))
    model.zero_grad()
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    kept = torch.ones_like(ids) if mask is None else mask
    torch.nn.functional.cross_entropy(logits[:, :-1][kept[:, 1:] > 0], ids[:, 1:][kept[:, 1:] > 0]).backward()
    return {name: part.grad.clone() for name, part in model.named_parameters() if part.grad is not None}


def assert_alike(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    largest = max(part.norm() for part in expected.values())
    for name, part in expected.items():
        error = (found[name].double() - part).norm()
        assert error < tolerance * part.norm() + 1e-3 * tolerance * largest, (name, error / part.norm())


@pytest.mark.parametrize("name", MODELS)
def test_every_gradient_is_that_of_transformers(name: str) -> None:
    model = MODELS[name]().double().train()
    mask = torch.ones(2, 70, dtype=torch.long)
    mask[1, :19] = 0
    with float64_throughout():
        plain, padded = gradients(model), gradients(model, mask)
    accelerate(model)
    with float64_throughout():
        assert_alike(gradients(model), plain, 1e-9)
        assert_alike(gradients(model, mask), padded, 1e-9)
        model.activation_checkpointing_enable()
        assert_alike(gradients(model), plain, 1e-9)
    assert_alike(gradients(model.float()), plain, 1e-3)


def test_bfloat16_gradients_lose_no_more_than_in_the_stock_model() -> None:
    exact = gradients(tiny_model().double())
    model = tiny_model().to(torch.bfloat16)
    errors = []
    for _ in range(2):
        found = gradients(model)
        errors.append(sum((found[name].double() - part).square().sum() for name, part in exact.items()))
        accelerate(model)
    assert errors[1] < 1.2 * errors[0]
