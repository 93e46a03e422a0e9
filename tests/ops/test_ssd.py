"""The recurrence: chunked against sequential in float64, both against transformers' scan and decode step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan, mamba2_selective_state_update

from ghostssm.ops import compiled
from ghostssm.ops.conv_norm import causal_conv
from ghostssm.ops.ssd import ssd, ssd_chunked, ssd_reference, ssd_step

CASES = [
    # groups, length, chunk, state size, with initial state
    (1, 1, 16, 16, True),
    (1, 64, 64, 128, False),
    (2, 50, 16, 7, True),
    (4, 33, 8, 1, False),
    (4, 100, 64, 20, True),
    (1, 130, 64, 33, True),
    (2, 65, 32, 64, False),
    (1, 70, 128, 96, True),
]


def streams(
    groups: int, length: int, n: int, initial: bool, dtype: torch.dtype = torch.float64, head_dim: int = 5
) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(groups * 1000 + length)
    b, h, p = 2, 8, head_dim

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=dtype)

    return {
        "x": normal(b, length, h, p),
        "dt": torch.rand(b, length, h, generator=draw, dtype=dtype),
        "A": -torch.rand(h, generator=draw, dtype=dtype) * 3,
        "B": normal(b, length, groups, n),
        "C": normal(b, length, groups, n),
        "D": normal(h),
        "initial_state": normal(b, h, p, n) if initial else None,
    }


@pytest.mark.parametrize(("groups", "length", "chunk", "n", "initial"), CASES)
def test_chunked_equals_reference(groups: int, length: int, chunk: int, n: int, initial: bool) -> None:
    s = streams(groups, length, n, initial)
    expected_y, expected_state = ssd_reference(**s)
    y, state = ssd_chunked(**s, chunk_size=chunk)
    torch.testing.assert_close(y, expected_y, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(state, expected_state, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_streams_in_half_precision_are_computed_on_in_float32(dtype: torch.dtype) -> None:
    s = streams(2, 20, 7, True)
    s = {name: part.to(dtype if name in "xBC" else torch.float32) for name, part in s.items()}
    expected_y, expected_state = ssd_reference(**{name: part.double() for name, part in s.items()})
    y, state = ssd(**s)
    assert y.dtype == dtype
    torch.testing.assert_close(y, expected_y.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-5)
    torch.testing.assert_close(state.double(), expected_state, rtol=1e-5, atol=1e-5)


def in_float32(s: dict[str, Any]) -> dict[str, Any]:
    return {name: None if tensor is None else tensor.float() for name, tensor in s.items()}


@pytest.mark.skipif(not compiled.HAS_KERNELS, reason="numba is not installed")
@pytest.mark.parametrize(("groups", "length", "chunk", "n", "initial"), CASES)
def test_compiled_equals_reference(groups: int, length: int, chunk: int, n: int, initial: bool) -> None:
    s = streams(groups, length, n, initial, head_dim=40)
    expected_y, expected_state = ssd_reference(**s)
    y, state = ssd(**in_float32(s))
    torch.testing.assert_close(y.double(), expected_y, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(state.double(), expected_state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("groups", "length", "chunk", "n", "initial"), CASES)
def test_chunked_equals_transformers(groups: int, length: int, chunk: int, n: int, initial: bool) -> None:
    s = streams(groups, length, n, initial, torch.float32)
    expected_y, expected_state = mamba2_chunk_scan(
        s["x"],
        s["dt"],
        s["A"],
        s["B"],
        s["C"],
        16,
        D=s["D"],
        initial_states=s["initial_state"],
        return_final_states=True,
    )
    y, state = ssd_chunked(**s, chunk_size=chunk)
    torch.testing.assert_close(y, expected_y, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(state, expected_state, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_step_equals_transformers(groups: int) -> None:
    s = streams(groups, 1, 12, True, torch.float32)
    h, p, n = 8, 5, 12
    state = s["initial_state"].clone()
    expected = mamba2_selective_state_update(
        state,
        s["x"][:, 0],
        s["dt"][:, 0, :, None].expand(-1, -1, p),
        s["A"][:, None, None].expand(h, p, n),
        s["B"][:, 0],
        s["C"][:, 0],
        D=s["D"][:, None].expand(h, p),
    )
    untouched = s["initial_state"].clone()
    y, after = ssd_step(s["initial_state"], s["x"][:, 0], s["dt"][:, 0], s["A"], s["B"][:, 0], s["C"][:, 0], s["D"])
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(after, state, rtol=1e-5, atol=1e-5)
    assert torch.equal(s["initial_state"], untouched)


def test_two_halves_joined_by_the_state_equal_the_whole() -> None:
    s = streams(2, 40, 9, False)
    whole, final = ssd_chunked(**s, chunk_size=16)
    parts, state = [], None
    for span in (slice(0, 23), slice(23, 40)):
        y, state = ssd_chunked(
            s["x"][:, span], s["dt"][:, span], s["A"], s["B"][:, span], s["C"][:, span], s["D"], state, chunk_size=16
        )
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)
    torch.testing.assert_close(state, final)


def test_non_contiguous_inputs() -> None:
    s = streams(2, 30, 8, True)
    strided = {k: v.transpose(0, 1).contiguous().transpose(0, 1) if k in "xBCdt" else v for k, v in s.items()}
    assert not strided["x"].is_contiguous()
    torch.testing.assert_close(ssd_chunked(**strided)[0], ssd_chunked(**s)[0])
    torch.testing.assert_close(ssd(**in_float32(strided))[0], ssd(**in_float32(s))[0])


def test_gradients_agree_with_the_reference() -> None:
    s = streams(2, 21, 6, True)
    leaves = [s[k].requires_grad_() for k in ("x", "dt", "A", "B", "C", "D", "initial_state")]
    gradients = []
    for scan in (ssd_reference, ssd_chunked):
        y, state = scan(**s)
        gradients.append(torch.autograd.grad(y.square().sum() + state.square().sum(), leaves))
    for expected, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("length", [1, 2, 11])
@pytest.mark.parametrize(("width", "bias"), [(1, True), (2, False), (4, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # the compiled loop, and the sum of shifted copies
def test_causal_conv_equals_conv1d(width: int, bias: bool, length: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    conv = torch.nn.Conv1d(6, 6, width, groups=6, padding=width - 1, bias=bias, dtype=dtype)
    x = torch.randn(2, length, 6, dtype=dtype)
    with torch.no_grad():
        expected = conv(x.transpose(1, 2))[..., :length].transpose(1, 2)
        torch.testing.assert_close(causal_conv(x, conv.weight.squeeze(1), conv.bias), expected)
