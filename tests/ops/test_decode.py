"""The fused decode step against its definition in float64, on fresh inputs in every run."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ghostssm.ops import compiled, gpu
from ghostssm.ops.conv_norm import gated_rms_norm, rms_norm
from ghostssm.ops.decode import StepWeights, block_norm, decode_step_, decode_step_reference, norm_step
from ghostssm.ops.state_format import StateStorage

BFLOAT16_STEP = torch.finfo(torch.bfloat16).eps
GUARD = 64


def guarded(*shape: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Random numbers inside a buffer of NaN; the buffer too."""
    count = math.prod(shape)
    buffer = torch.full((count + 2 * GUARD,), math.nan, dtype=dtype, device=device)
    inner = buffer[GUARD : GUARD + count].view(shape)
    inner.copy_(torch.randn(shape, dtype=torch.float64))
    return inner, buffer


def weights_of(
    heads: int, channels: int, groups: int, n: int, p: int, dtype: torch.dtype, device: str, *,
    width: int = 4, bias: bool = True, r: int | None = None,
) -> StepWeights:  # fmt: skip
    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, dtype=torch.float64) * scale).to(device, dtype)

    return StepWeights(
        taps=draw(channels, width, scale=0.5),
        bias=draw(channels) if bias else None,
        dt_bias=draw(heads, scale=3) - 2,
        A_log=draw(heads),
        D=draw(heads),
        groups=groups,
        head_dim=p,
        B_maps=None if r is None else draw(groups, n, r, scale=n**-0.5),
        C_maps=None if r is None else draw(groups, n, r, scale=n**-0.5),
    )


def in_float64(value: Any) -> Any:
    return value.double().cpu() if isinstance(value, Tensor) else value


def check(
    device: str, *, n: int, groups: int, b: int, heads: int = 8, p: int = 32, r: int | None = None, width: int = 4,
    dtype: torch.dtype = torch.float32, state_dtype: torch.dtype = torch.float32, gate: bool = True, **more: Any,
) -> None:  # fmt: skip
    channels = heads * p + 2 * groups * n
    weights = weights_of(heads, channels, groups, n, p, dtype, device, width=width, r=r, **more)
    state, state_buffer = guarded(b, heads, p, r or n, dtype=state_dtype, device=device)
    window, window_buffer = guarded(b, channels, width, dtype=dtype, device=device)
    row = 2 * heads * p + 2 * groups * n + heads
    rows, _ = guarded(b, row + 7, dtype=dtype, device=device)  # in_proj's output, with something beside it
    rows[:, row:] = math.nan
    z, xBC, dt = rows[:, :row].split([heads * p, channels, heads], dim=1)

    given = (window, state, xBC, dt, z if gate else None)
    y, new_window, new_state = decode_step_reference(
        *(in_float64(tensor) for tensor in given), StepWeights(**{k: in_float64(v) for k, v in vars(weights).items()})
    )
    found = decode_step_(*given, weights, StateStorage.of(state_dtype))

    assert found.dtype == torch.float32
    assert found.shape == y.shape
    assert (in_float64(found) - y).norm() < 2e-6 * y.norm()
    assert torch.equal(in_float64(window), new_window)
    # To the nearest on a GPU; the interpreter cuts off.
    largest = {torch.float32: 3e-6, torch.bfloat16: BFLOAT16_STEP if device == "cpu" else BFLOAT16_STEP / 2}[
        state_dtype
    ]
    error = (in_float64(state) - new_state).abs()
    assert (error <= largest * new_state.abs() + 1e-5 * largest + 3e-6).all()
    for buffer in (state_buffer, window_buffer):
        assert buffer[:GUARD].isnan().all()
        assert buffer[-GUARD:].isnan().all()


@pytest.fixture
def fused(triton_device: str, fresh_seed: int, _poisoned: None, monkeypatch: pytest.MonkeyPatch) -> str:
    """The device; the test fails if the call is not served by the kernels."""
    monkeypatch.setattr("ghostssm.ops.decode.ssd_step_", None)
    monkeypatch.setattr("ghostssm.ops.decode.gated_rms_norm", None)
    return triton_device


@pytest.mark.parametrize(
    ("n", "groups", "b"),
    [(128, 1, 1), (96, 2, 2), (80, 8, 1), (64, 4, 3), (48, 8, 1), (32, 1, 3), (16, 2, 2), (5, 4, 2), (33, 1, 1)],
)
def test_state_sizes_and_groups(fused: str, n: int, groups: int, b: int) -> None:
    check(fused, n=n, groups=groups, b=b)
    check(fused, n=n, groups=groups, b=1, dtype=torch.bfloat16, state_dtype=torch.bfloat16)


@pytest.mark.parametrize(("p", "heads"), [(5, 2), (40, 2), (64, 2), (80, 1), (128, 1)])
def test_head_dims(fused: str, p: int, heads: int) -> None:
    check(fused, n=20, groups=1, b=2, p=p, heads=heads, dtype=torch.bfloat16)


def test_a_state_wider_than_a_tile(fused: str) -> None:
    check(fused, n=600, groups=1, b=1, p=16, heads=1)


@pytest.mark.parametrize(
    ("dtype", "state_dtype"), [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "float32")]
)
def test_dtypes_of_weights_and_state_are_independent(fused: str, dtype: str, state_dtype: str) -> None:
    check(fused, n=24, groups=2, b=2, heads=4, dtype=getattr(torch, dtype), state_dtype=getattr(torch, state_dtype))


@pytest.mark.parametrize(("n", "r"), [(64, 48), (64, 20), (33, 33), (16, 1)])
def test_projected_streams(fused: str, n: int, r: int) -> None:
    check(fused, n=n, groups=2, b=2, heads=4, r=r)


@pytest.mark.parametrize("width", [1, 2, 3])
def test_convolutions_of_other_widths_without_bias_and_gate(fused: str, width: int) -> None:
    check(fused, n=8, groups=2, b=2, heads=4, width=width, bias=False, gate=False)


@pytest.mark.parametrize("gate_first", [True, False])
@pytest.mark.parametrize(("groups", "dtype"), [(1, torch.float32), (3, torch.bfloat16)])
def test_norm(fused: str, gate_first: bool, groups: int, dtype: torch.dtype) -> None:
    y, z, weight = torch.randn(3, 60), torch.randn(3, 130)[:, 7:67].to(dtype), torch.randn(60).to(dtype)
    expected = gated_rms_norm(y.double(), z.double(), weight.double(), 1e-5, groups, gate_first=gate_first)
    found = norm_step(y.to(fused), z.to(fused), weight.to(fused), 1e-5, groups, dtype, gate_first=gate_first)
    assert found.dtype == dtype
    assert (in_float64(found) - expected).norm() < (1e-6 if dtype == torch.float32 else 5e-3) * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_between_blocks(fused: str, dtype: torch.dtype) -> None:
    x, weight = torch.randn(2, 3, 60).to(fused, dtype), torch.randn(60).to(fused, dtype)
    found = block_norm(x, weight, 1e-5)
    assert found is not None
    assert found.dtype == dtype
    expected = rms_norm(in_float64(x), in_float64(weight), 1e-5)
    assert (in_float64(found) - expected).norm() < (1e-6 if dtype == torch.float32 else 5e-3) * expected.norm()


def test_without_the_kernels_the_definition_holds_too(fresh_seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "device_types", set())
    check("cpu", n=12, groups=2, b=2, heads=4, p=8, r=5)
    check("cpu", n=12, groups=2, b=2, heads=4, p=8, state_dtype=torch.bfloat16)
    monkeypatch.setattr(compiled, "kernels", None)
    check("cpu", n=12, groups=2, b=2, heads=4, p=8, gate=False)


def test_what_the_kernels_do_not_take(triton_device: str) -> None:
    some = torch.zeros(2, 3, device=triton_device)
    assert gpu.usable(some, None, some.bfloat16())
    assert not gpu.usable(some.double())
    assert not gpu.usable(some, some.clone().requires_grad_())
    assert not gpu.usable(some[:0])
    assert not gpu.usable(some.to("meta"))
    with torch.no_grad():
        assert gpu.usable(some, some.clone().requires_grad_())
