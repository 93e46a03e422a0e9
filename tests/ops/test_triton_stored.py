"""The kernels over stored states against the readable reference, on fresh inputs in every run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ghostssm.ops.ssd import ssd_step
from ghostssm.ops.state_format import StateFormat, StateStorage, dequantise, quantise
from ghostssm.ops.step import ssd_step_
from ghostssm.ops.stored import stored_scan_, stored_scan_reference
from tests.ops.test_stored import formats, levels, roundings, some_state
from tests.ops.test_tiers import TIERED
from tests.ops.test_triton_scan import streams

HEADS = 4


@pytest.fixture
def fused(triton_device: str, fresh_seed: int, _poisoned: None, monkeypatch: pytest.MonkeyPatch) -> str:
    """The device; the test fails if the call is not served by the kernels."""
    monkeypatch.setattr("ghostssm.ops.stored.compiled", None)
    return triton_device


def tokens(device: str, groups: int, n: int, p: int, length: int) -> dict[str, Tensor]:
    """What a scan takes of two sequences: strided, with NaN before and after."""
    given: dict[str, Any] = streams(device, groups, HEADS, p, n, length, False)
    del given["initial_state"]
    return given | {"D": torch.randn(HEADS).to(device)}


def on_cpu(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: part.cpu() for name, part in given.items()}


def check_bit_for_bit(device: str, storage: StateStorage, groups: int, n: int, p: int, length: int) -> None:
    """Every byte, and none of the sequences beside them; with a decay of exactly 1, whose exponential all agree on."""
    given = tokens(device, groups, n, p, length)
    given["A"] = torch.full_like(given["A"], -1e-12)
    before = quantise(some_state(4, HEADS, p, n), storage)
    memory = before.to(device)
    y, after = stored_scan_reference(before[1:3], storage, **on_cpu(given))
    found = stored_scan_(memory[1:3], storage, **given).cpu()
    expected = torch.cat([before[:1], after, before[3:]])
    assert torch.equal(memory.cpu().view(torch.uint8), expected.view(torch.uint8))
    assert (found - y).norm() < 2e-6 * y.norm()


@formats
@roundings
@pytest.mark.parametrize(("groups", "n", "p", "length"), [(1, 60, 5, 1), (2, 33, 12, 2), (4, 7, 3, 3)])
def test_codes_and_scales_are_those_of_the_reference(
    fused: str, fresh_seed: int, form: StateFormat, rounding: str, groups: int, n: int, p: int, length: int
) -> None:
    check_bit_for_bit(fused, StateStorage.of(form, rounding, fresh_seed << 20).at(3, 17), groups, n, p, length)


@roundings
@pytest.mark.parametrize("tiers", [TIERED, ((16, 20), (40, 3), (0, 33), (7, 1))])
def test_tiers_are_those_of_the_reference(fused: str, fresh_seed: int, rounding: str, tiers: Any) -> None:
    storage = StateStorage.of("tiers", rounding, fresh_seed << 20).with_tiers(tiers).at(2, 11)
    check_bit_for_bit(fused, storage, 2, max(wide + narrow for wide, narrow in tiers) + 2, 10, 2)


@formats
@pytest.mark.parametrize(("groups", "n", "p"), [(1, 128, 6), (4, 40, 16)])
def test_a_step_in_float64(fused: str, form: StateFormat, groups: int, n: int, p: int) -> None:
    """A GPU's exponential is off by some last bits: scales by as much, and few codes fall to the other side."""
    given = {name: part[:, 0] if part.ndim > 1 else part for name, part in tokens(fused, groups, n, p, 1).items()}
    storage = StateStorage(form)
    stored = quantise(some_state(2, HEADS, p, n), storage).to(fused)
    before = dequantise(stored, form, p, n).cpu()
    y, state = ssd_step(before.double(), **{name: part.double() for name, part in on_cpu(given).items()})
    found = ssd_step_(stored, **given, storage=storage).cpu()
    assert (found.double() - y).norm() < 2e-6 * y.norm()
    expected = dequantise(quantise(state.float(), storage), form, p, n)
    got = dequantise(stored, form, p, n).cpu()
    off, step = (got - expected).abs(), levels(state, form).nan_to_num()
    # An error of float32 goes with the terms of the sum, which may cancel each other.
    terms = ssd_step(
        before.abs(), **{name: part.abs() if name in "xB" else part for name, part in on_cpu(given).items()}
    )
    same = 1e-6 * terms[1]
    assert (off <= step * (1 + 1e-6) + same).all()
    assert (off > same).float().mean() < 0.01
