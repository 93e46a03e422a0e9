"""The in-place decode step against the readable reference, in every form."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ghostssm.ops import compiled, step
from ghostssm.ops.ssd import ssd_step
from ghostssm.ops.state_format import BFLOAT16, StateStorage

SIZES = [1, 7, 20, 33, 64, 96, 128]


@pytest.fixture(params=["compiled", "torch"], autouse=True)
def _backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        monkeypatch.setattr(compiled, "kernels", None)
    elif not compiled.HAS_KERNELS:
        pytest.skip("numba is not installed")


def inputs(groups: int, n: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(groups * 1000 + n)
    b, h, p = 3, 8, 5
    return (
        torch.randn(b, h, p, n),
        torch.randn(b, h, p),
        torch.rand(b, h),
        -torch.rand(h) * 3,
        torch.randn(b, groups, n),
        torch.randn(b, groups, n),
        torch.randn(h),
    )


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_float32_state(groups: int, n: int) -> None:
    state, *rest = inputs(groups, n)
    y, after = ssd_step(state.double(), *(tensor.double() for tensor in rest))
    found = step.ssd_step_(state, *rest)
    torch.testing.assert_close(found.double(), y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state.double(), after, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n", SIZES)
def test_bfloat16_state_is_rounded_to_nearest_when_stored(n: int) -> None:
    state, *rest = inputs(2, n)
    state = state.bfloat16()
    y, after = ssd_step(state.double(), *(tensor.double() for tensor in rest))
    found = step.ssd_step_(state, *rest, StateStorage(BFLOAT16))
    torch.testing.assert_close(found.double(), y, rtol=1e-5, atol=1e-5)
    half_a_step = torch.finfo(torch.bfloat16).eps * after.abs() / 2
    assert ((state.double() - after).abs() <= half_a_step + 1e-6).all()


def test_strided_inputs() -> None:
    state, x, dt, A, B, C, D = inputs(2, 20)
    wide = torch.randn(3, 8 * 5 + 2 * 40)
    x, B, C = wide[:, :40].view(3, 8, 5), wide[:, 40:80].view(3, 2, 20), wide[:, 80:].view(3, 2, 20)
    assert not x.is_contiguous()
    y, after = ssd_step(state, x, dt, A, B, C, D)
    torch.testing.assert_close(step.ssd_step_(state, x, dt, A, B, C, D), y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, after, rtol=1e-5, atol=1e-5)


def test_a_strided_state_is_updated_in_place_too() -> None:
    state, *rest = inputs(2, 20)
    strided = state.transpose(0, 1).contiguous().transpose(0, 1)
    _, after = ssd_step(state, *rest)
    step.ssd_step_(strided, *rest)
    torch.testing.assert_close(strided, after, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_conv_step(width: int, bias: bool) -> None:
    torch.manual_seed(0)
    window, x, weight = torch.randn(3, 6, width), torch.randn(3, 6), torch.randn(6, width)
    offset = torch.randn(6) if bias else None
    shifted = torch.cat([window[..., 1:], x[..., None]], dim=-1)
    expected = F.silu((shifted * weight).sum(-1) + (0 if offset is None else offset))
    torch.testing.assert_close(step.conv_step_(window, x, weight, offset), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(window, shifted)


def test_a_process_keeps_its_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """When numba starts its pool it sets OpenMP's number of threads, which is torch's as well."""
    if compiled.kernels is None:
        pytest.skip("without the loops there is no pool")
    monkeypatch.setattr(compiled.kernels, "use_threads", lambda count: torch.set_num_threads(count + 1))
    before = torch.get_num_threads()
    compiled.arrays(torch.zeros(1))
    assert torch.get_num_threads() == before
