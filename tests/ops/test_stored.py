"""Stored states: rounding against its definition in float64, compiled loops against the readable reference."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ghostssm.errors import InputError
from ghostssm.ops import compiled
from ghostssm.ops.state_format import (
    BFLOAT16,
    FLOAT16,
    FORMATS,
    FP8,
    INT4,
    INT8,
    StateFormat,
    StateStorage,
    dequantise,
    quantise,
)
from ghostssm.ops.stored import stored_scan_, stored_scan_reference

ROUNDED = [each for each in FORMATS.values() if each.name != "float32"]
formats = pytest.mark.parametrize("form", ROUNDED, ids=lambda form: form.name)
roundings = pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
needs_numba = pytest.mark.skipif(not compiled.HAS_KERNELS, reason="numba is not installed")


def levels(state: Tensor, form: StateFormat) -> Tensor:
    """The distance between neighbours around every number of a state, float64."""
    state = state.double()
    scale = torch.ones(()) if form.largest is None else state.abs().amax(-1, keepdim=True) / form.largest
    if form in (INT8, INT4):
        return scale.expand_as(state)
    exponent = torch.floor(torch.log2((state / scale).abs())).clamp_min(1 - form.bias)
    return scale * torch.exp2(exponent - form.mantissa)


def some_state(*shape: int) -> Tensor:
    """Magnitudes over many orders, with a row of zeros."""
    state = (torch.randn(shape) * torch.exp(torch.randn(shape) * 3)).clamp(-6e4, 6e4)
    state[0, 0, 0] = 0
    return state


@formats
@pytest.mark.parametrize("n", [1, 7, 32, 33])
def test_nearest_is_within_half_a_level(form: StateFormat, n: int, fresh_seed: int) -> None:
    state = some_state(2, 3, 5, n)
    found = dequantise(quantise(state, StateStorage(form)), form, 5, n)
    error = (found.double() - state.double()).abs()
    assert (error <= levels(state, form).nan_to_num() / 2 * (1 + 1e-6) + 1e-7 * state.abs()).all()


@formats
def test_stochastic_is_one_of_two_neighbours_and_right_on_average(form: StateFormat, fresh_seed: int) -> None:
    state, draws = some_state(1, 2, 3, 16), 2000
    stored = quantise(state.expand(draws, -1, -1, -1), StateStorage(form, stochastic=True, seed=fresh_seed))
    many = dequantise(stored, form, 3, 16).double()
    step = levels(state, form).nan_to_num()
    error = many - state.double()
    assert (error.abs() <= step * (1 + 1e-6) + 1e-6 * state.abs()).all()
    # A number between two neighbours has a variance of at most a quarter of their squared distance.
    bound = 5 * step / 2 / math.sqrt(draws)
    assert (error.mean(0).abs() <= bound + 1e-6 * state.abs()).all()
    assert error.mean(0).abs().sum() < 0.1 * step.sum()


@roundings
@formats
@pytest.mark.parametrize(("groups", "n", "p"), [(1, 32, 5), (2, 33, 37), (4, 7, 64), (1, 260, 5)])
@needs_numba
def test_compiled_loops_are_the_reference(form: StateFormat, rounding: str, groups: int, n: int, p: int) -> None:
    """Token by token from the same stored state: what is rounded differently once may differ by more later."""
    torch.manual_seed(n)
    b, h = 2, 4
    storage = StateStorage.of(form, rounding, seed=2**40 + 5)
    stored = quantise(some_state(b, h, p, n), storage.at(3, 16))
    x, dt = torch.randn(b, 3, h, p), torch.rand(b, 3, h)
    A, D = -torch.rand(h), torch.randn(h)
    B, C = torch.randn(b, 3, groups, n), torch.randn(b, 3, groups, n)
    at_once = stored.clone()
    outputs = stored_scan_(at_once, storage.at(3, 17), x, dt, A, B, C, D)
    for t in range(3):
        now = slice(t, t + 1)
        token, before = (x[:, now], dt[:, now], A, B[:, now], C[:, now], D), dequantise(stored, form, p, n)
        y, after = stored_scan_reference(stored, storage.at(3, 17 + t), *token)
        assert torch.equal(dequantise(stored, form, p, n), before)
        found = stored_scan_(stored, storage.at(3, 17 + t), *token)
        assert torch.equal(found, outputs[:, now])
        expected, got = (dequantise(each, form, p, n) for each in (after, stored))
        step = torch.maximum(*(levels(each, form).nan_to_num().float() for each in (got, expected)))
        decayed = before * torch.exp(dt[:, t] * A)[..., None, None]
        added = (x[:, t] * dt[:, t, :, None])[..., None] * B[:, t].repeat_interleave(h // groups, dim=1)[:, :, None]
        # Both add up in another order, so that a number on the edge between two levels may fall to either side.
        assert ((got - expected).abs() <= 1.01 * step + 1e-6 * (decayed.abs() + added.abs())).all()
        assert ((got - expected).abs() > 0.01 * step + 1e-5 * expected.abs()).float().mean() < 0.01
        terms = (decayed.abs() + added.abs()) * C[:, t].abs().repeat_interleave(h // groups, dim=1)[:, :, None]
        assert ((found - y)[:, 0].abs() <= 2e-6 * (terms.sum(-1) + (D[:, None] * x[:, t]).abs())).all()
    assert torch.equal(at_once, stored)


@needs_numba
@roundings
@formats
def test_the_number_of_threads_makes_no_difference(form: StateFormat, rounding: str) -> None:
    storage, after = StateStorage.of(form, rounding, seed=1), []
    state, x, dt = torch.randn(2, 4, 37, 33), torch.randn(2, 5, 4, 37), torch.rand(2, 5, 4)
    A, B, C, D = -torch.rand(4), torch.randn(2, 5, 2, 33), torch.randn(2, 5, 2, 33), torch.randn(4)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        after.append(quantise(state, storage))
        stored_scan_(after[-1], storage, x, dt, A, B, C, D)
    torch.set_num_threads(1)
    assert torch.equal(*after)


@needs_numba
@pytest.mark.parametrize("form", [FLOAT16, FP8], ids=lambda form: form.name)
def test_a_processor_without_float16(form: StateFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ghostssm.ops._lane_codes.converts_halves", lambda: False)
    stored, storage = quantise(torch.randn(2, 4, 8, 9), StateStorage(form)), StateStorage(form)
    x, dt, A, D = torch.randn(2, 1, 4, 8), torch.rand(2, 1, 4), -torch.rand(4), torch.randn(4)
    B, C = torch.randn(2, 2, 1, 1, 9)
    y, after = stored_scan_reference(stored, storage, x, dt, A, B, C, D)
    assert torch.equal(stored_scan_(stored, storage, x, dt, A, B, C, D), y)
    assert torch.equal(stored, after)


@needs_numba
@pytest.mark.parametrize(("features", "converts"), [("", False), ("+avx2", False), ("+avx2,+f16c", True)])
def test_what_numba_compiles_for_counts(features: str, converts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """NUMBA_CPU_NAME=generic gives no features, whatever this processor has."""
    monkeypatch.setattr("numba.config.CPU_FEATURES", features)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert compiled.lane_codes.converts_halves.__wrapped__() == converts


@needs_numba
def test_fp8_is_that_of_torch_bit_for_bit(fresh_seed: int) -> None:
    """As training writes it, a row at a time, with a scale of 1."""
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # all that are not negative
    between = (codes[1:] + codes[:-1]) / 2
    near = torch.cat([torch.nextafter(between, torch.tensor(way)) for way in (0.0, 500.0)])
    values = torch.cat([codes, between, near, -codes, -between, -near, torch.randn(100)])
    stored, none = torch.zeros(len(values), dtype=torch.int8), torch.zeros(0, dtype=torch.int16)
    row = compiled.arrays(stored, none), np.float32(1), values.numpy(), np.uint32(0), False
    from ghostssm.ops._kernels_straight_through import write_row

    write_row(FP8.kind, *row[0], *row[1:])
    assert torch.equal(stored.view(torch.float8_e4m3fn).float(), values.to(torch.float8_e4m3fn).float())


@needs_numba
@pytest.mark.parametrize("form", [BFLOAT16, FLOAT16, FP8], ids=lambda form: form.name)
def test_vectors_round_as_torch_does(form: StateFormat) -> None:
    """What a step writes into a state of zeros: every number of the format, and numbers near and halfway between two.

    A row has a scale of 1 by its largest number; then it is computed in other units, which may move what is halfway.
    """
    assert form.dtype is not None
    codes = (
        torch.arange(1 << form.bits - 1).to(torch.int16 if form.bits == 16 else torch.uint8).view(form.dtype).float()
    )
    codes = codes[codes.isfinite()]
    between = (codes[1:].double() + codes[:-1]) / 2
    parts = [codes, (between * (1 - 1e-5)).float(), (between * (1 + 1e-5)).float()]
    values = torch.cat(parts if form.scaled else [*parts, between.float()])
    values = torch.cat([values, -values])
    n = 32
    rows = torch.cat([values, values.new_zeros(-len(values) % (n - 1))]).view(-1, n - 1)
    rows = torch.cat([rows, torch.full((len(rows), 1), codes.max().item())], dim=1)
    b, p, storage = len(rows), 5, StateStorage(form)
    stored = quantise(torch.zeros(b, 1, p, n), storage)
    streams = rows[:, None, None], rows[:, None, None], torch.ones(1)
    stored_scan_(stored, storage, torch.ones(b, 1, 1, p), torch.ones(b, 1, 1), -torch.ones(1), *streams)
    codes = stored[:, 0, : p * n].view(form.dtype).view(b, n, p).mT if form.scaled else stored[:, 0]
    expected = rows.to(form.dtype).float()[:, None].expand(-1, p, -1)
    torch.testing.assert_close(codes.float(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.name)
def test_bytes_and_zeros(form: StateFormat) -> None:
    stored = quantise(torch.randn(3, 2, 16, 32), StateStorage(form))
    assert stored.nbytes == 3 * form.state_bytes(2 * 16, 32)
    assert dequantise(stored.zero_(), form, 16, 32).abs().max() == 0
    assert (StateFormat.of(form.name), StateFormat.of(form)) == (form, form)
    assert form.dtype is None or StateFormat.of(form.dtype) is form


@pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.name)
def test_a_copy_of_a_format_is_the_format(form: StateFormat) -> None:
    """A copy of a model that was accelerated has one."""
    storage = StateStorage(form)
    other, state = copy.deepcopy(storage), torch.randn(1, 2, 5, 9)
    assert other.rounds == storage.rounds
    stored, x, dt, B = quantise(state, storage), torch.randn(1, 1, 2, 5), torch.rand(1, 1, 2), torch.randn(1, 1, 1, 9)
    assert torch.equal(quantise(state, other), stored)
    assert torch.equal(dequantise(stored, other.format, 5, 9), dequantise(stored, form, 5, 9))
    if storage.rounds:
        same, D = stored.clone(), torch.randn(2)
        y = stored_scan_(stored, storage, x, dt, -torch.ones(2), B, B, D)
        assert torch.equal(stored_scan_(same, other, x, dt, -torch.ones(2), B, B, D), y)
        assert torch.equal(same, stored)


def test_what_there_is_not() -> None:
    with pytest.raises(InputError, match="not rounded"):
        StateStorage.of("float32", "stochastic")
