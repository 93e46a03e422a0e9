"""The accelerated model against the stock one: outputs, caches, padding, generation."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ghostssm import accelerate, load, restore
from ghostssm.errors import InputError
from ghostssm.models.families import mixers_of
from ghostssm.models.forward import replaced_forward, rounded_forward
from ghostssm.ops import compiled, gpu
from ghostssm.ops.state_format import StateFormat, StateStorage
from ghostssm.plan.surgery import apply_plan, pruned
from ghostssm.pruning.run import Calibration
from tests.conftest import VOCABULARY, random_windows, tiny_model

SHAPES: list[dict[str, Any]] = [
    {},
    {"n_groups": 2, "use_bias": True, "use_conv_bias": False, "state_size": 33},
    {"n_groups": 4, "conv_kernel": 2, "state_size": 7},
]


@pytest.fixture(params=["compiled", "torch"])
def _backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        monkeypatch.setattr(compiled, "kernels", None)
    elif not compiled.HAS_KERNELS:
        pytest.skip("numba is not installed")


def tokens(*shape: int) -> Tensor:
    return torch.randint(1, VOCABULARY, shape, generator=torch.Generator().manual_seed(3))


def stepwise(model: Any, ids: Tensor, pieces: list[int], mask: Tensor | None = None) -> Tensor:
    """Logits when the ids arrive in pieces, through one cache."""
    logits, cache, start = [], None, 0
    for piece in pieces:
        span = slice(start, start + piece)
        extra = {"attention_mask": mask[:, span]} if mask is not None and start == 0 else {}
        output = model(input_ids=ids[:, span], cache_params=cache, use_cache=True, **extra)
        logits.append(output.logits)
        cache, start = output.cache_params, start + piece
    return torch.cat(logits, dim=1)


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("pieces", [[20], [12, 1, 1, 1, 5], [1, 1, 18], [2, 9, 1, 1, 7]])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_through_a_cache(shape: dict[str, Any], pieces: list[int]) -> None:
    model, ids = tiny_model(**shape), tokens(3, 20)
    with torch.inference_mode():
        expected = stepwise(model, ids, pieces)
        accelerate(model)
        torch.testing.assert_close(stepwise(model, ids, pieces), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("_backend")
def test_left_padding() -> None:
    model, ids = tiny_model(n_groups=2, use_bias=True), tokens(3, 16)
    mask = torch.ones_like(ids)
    mask[0, :5], mask[2, :11] = 0, 0
    with torch.inference_mode():
        expected = stepwise(model, ids, [14, 1, 1], mask)
        accelerate(model)
        found = stepwise(model, ids, [14, 1, 1], mask)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_generate_gives_the_same_tokens(options: dict[str, Any]) -> None:
    model, ids = tiny_model(), tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    arguments = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False} | options
    expected = model.generate(ids, **arguments)
    accelerate(model)
    assert torch.equal(model.generate(ids, **arguments), expected)


def test_gradients_flow() -> None:
    model, ids = tiny_model(), tokens(1, 30)
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append(model.backbone.layers[0].mixer.in_proj.weight.grad.clone())
        accelerate(model)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_lose_no_more_than_in_the_stock_model(dtype: torch.dtype) -> None:
    model, ids = tiny_model().to(dtype), tokens(4, 30)
    pieces = [20] + [1] * 10
    with torch.inference_mode():
        exact = stepwise(copy.deepcopy(model).float(), ids, pieces)
        stock_error = (stepwise(model, ids, pieces) - exact).square().mean().sqrt()
        accelerate(model)
        own_error = (stepwise(model, ids, pieces) - exact).square().mean().sqrt()
    assert own_error < 1.1 * stock_error


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize(("dtype", "largest"), [("bfloat16", 0.03), ("float16", 0.01), ("int8", 0.3), ("fp8", 0.5)])
def test_a_narrow_state_is_small_and_nearly_as_good(dtype: str, largest: float) -> None:
    model, ids = tiny_model(n_groups=2), tokens(2, 24)
    with torch.inference_mode():
        expected = stepwise(model, ids, [4] + [1] * 20)
        accelerate(model, state_dtype=dtype)
        cache = model(input_ids=ids[:, :4], use_cache=True).cache_params
        found = stepwise(model, ids, [4] + [1] * 20)
    stored = cache.get_recurrent_state(0, state_idx=0)
    assert stored.nbytes == 2 * StateFormat.of(dtype).state_bytes(8 * 8, 16)
    error = (found - expected).abs().max() / expected.abs().max()
    assert 0 < error < largest


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", ["bfloat16", "fp8", "int4"])
def test_rounding_after_every_token_is_what_decoding_does(dtype: str, rounding: str) -> None:
    """Pads write nothing, so that a padded sequence's states are those of the sequence alone."""
    model, ids = tiny_model(n_groups=2, state_size=7), tokens(2, 12)
    # Products with weights differ in last bits, and one draw in ten has a number so near the edge that it goes to its
    # other neighbour: the logits then differ by some 1e-4. This draw has none. Other random words would make 3e-2.
    storage = StateStorage.of(dtype, rounding, seed=5)
    with torch.inference_mode():
        accelerate(model, state_dtype=dtype, state_rounding=rounding, seed=5)
        expected = stepwise(model, ids, [1] * 12)
        with replaced_forward(mixers_of(model), rounded_forward(storage)):
            torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(stepwise(model, ids, [5, 1, 6]), expected, rtol=1e-4, atol=1e-4)
        with replaced_forward(mixers_of(model), rounded_forward(storage, first_sequence=1)):
            torch.testing.assert_close(model(ids[1:], use_cache=False).logits, expected[1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
def test_generating_from_an_int8_state_with_padding(options: dict[str, Any]) -> None:
    model, ids = tiny_model(), tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    accelerate(model, state_dtype="int8")
    arguments = {"max_new_tokens": 12, "do_sample": False} | options
    together = model.generate(ids, attention_mask=mask, **arguments)
    alone = model.generate(ids[1:, 4:], **arguments)
    assert torch.equal(together[1:, 9:], alone[:, 5:])


def test_restore_and_nesting() -> None:
    model, ids = tiny_model(), tokens(1, 10)
    mixers = mixers_of(model)
    with torch.inference_mode():
        stock = model(ids).logits
        accelerate(model)
        own = mixers[0].module.forward
        with replaced_forward(mixers):
            assert mixers[0].module.forward is not own
        assert mixers[0].module.forward is own
        restore(model)
        assert "forward" not in mixers[0].module.__dict__
        assert torch.equal(model(ids).logits, stock)


@pytest.mark.usefixtures("_backend")
def test_pruning_an_accelerated_model() -> None:
    ids = tokens(2, 20)
    model, stock = tiny_model(n_groups=2), tiny_model(n_groups=2)
    accelerate(model)
    plan = Calibration(model, random_windows(2, 40)).plan("ghost", 5)
    with torch.inference_mode():
        dense = model(ids).logits
        with pruned(model, plan), pruned(stock, plan):
            expected = stepwise(stock, ids, [18, 1, 1])
            torch.testing.assert_close(stepwise(model, ids, [18, 1, 1]), expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(model(ids).logits, dense)
        apply_plan(model, plan)
        torch.testing.assert_close(stepwise(model, ids, [18, 1, 1]), expected, rtol=1e-4, atol=1e-4)


def test_an_impossible_state_dtype() -> None:
    with pytest.raises(InputError, match=r"torch.int16.; expected one of: float32, .*, int4"):
        accelerate(tiny_model(), state_dtype=torch.int16)
    with pytest.raises(InputError, match=r"'up'; expected nearest or stochastic"):
        accelerate(tiny_model(), state_dtype="int8", state_rounding="up")


def test_the_cached_state_is_dense_whatever_computed_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the kernels of the decode step would not take it."""
    monkeypatch.setattr(compiled, "kernels", None)
    monkeypatch.setattr(gpu, "device_types", set())
    model = tiny_model()
    accelerate(model)
    with torch.no_grad():
        cache = model(input_ids=torch.arange(1, 9)[None], use_cache=True).cache_params
    assert cache.get_recurrent_state(0, state_idx=0).is_contiguous()


def test_a_model_over_several_devices_is_refused() -> None:
    model = tiny_model()
    model.hf_device_map = {"backbone": 0, "lm_head": "cpu"}
    with pytest.raises(InputError, match=r"several devices \(0, cpu\)"):
        accelerate(model)


@pytest.mark.parametrize("call", [accelerate, lambda given: Calibration(given, random_windows(1, 8))])
def test_a_checkpoint_in_place_of_its_model_is_named(call: Any, small: Path) -> None:
    with pytest.raises(InputError, match=r"Found a Checkpoint in place of a model; .* the \.model"):
        call(load(str(small)))
