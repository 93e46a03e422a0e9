"""The scan's backward pass: `gradcheck` in float64, and autograd through the chunked form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ghostssm.ops import compiled
from ghostssm.ops.ssd import ssd, ssd_chunked
from tests.ops.test_ssd import streams

CASES = [
    # groups, length, head dim, state size, with initial state
    (1, 1, 5, 16, True),
    (2, 50, 40, 7, True),
    (4, 33, 1, 1, False),
    (4, 100, 33, 20, True),
    (1, 131, 64, 128, True),
    (8, 70, 6, 3, True),
    (2, 64, 16, 33, False),
    (1, 20, 34, 140, True),
    (2, 9, 70, 70, True),
]


@pytest.fixture(params=["compiled", "chunks"], autouse=True)
def _form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test holds for both forms of the backward pass."""
    if request.param == "chunks":
        monkeypatch.setattr(compiled, "kernels", None)
    elif not compiled.HAS_KERNELS:
        pytest.skip("numba is not installed")


def gradients(scan: Any, arguments: dict[str, Any], of: str = "both") -> dict[str, Tensor]:
    """The gradients of uneven weights on y, on the final state, or on both."""
    leaves = {name: part.detach().clone().requires_grad_() for name, part in arguments.items() if part is not None}
    parts = dict(zip(("y", "state"), scan(**arguments | leaves), strict=True))
    chosen = [part for name, part in parts.items() if of in (name, "both")]
    loss = sum((part * torch.cos(torch.arange(part.numel(), dtype=part.dtype).view_as(part))).sum() for part in chosen)
    found = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    return dict(zip(leaves, found, strict=True))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_gradcheck(groups: int) -> None:
    leaves = {name: part.requires_grad_() for name, part in streams(groups, 5, 3, True, head_dim=2).items()}

    def scan(*parts: Tensor) -> tuple[Tensor, Tensor]:
        return ssd(**dict(zip(leaves, parts, strict=True)))

    assert torch.autograd.gradcheck(scan, tuple(leaves.values()))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize(("groups", "length", "p", "n", "initial"), CASES)
def test_gradients_equal_autograd_through_chunks(
    groups: int, length: int, p: int, n: int, initial: bool, dtype: torch.dtype, tolerance: float
) -> None:
    s = streams(groups, length, n, initial, head_dim=p)
    expected = gradients(ssd_chunked, s)
    found = gradients(ssd, {name: None if part is None else part.to(dtype) for name, part in s.items()})
    for name, gradient in expected.items():
        assert (found[name].double() - gradient).norm() < tolerance * gradient.norm(), name


@pytest.mark.parametrize("of", ["y", "state"])
def test_one_of_the_two_results_is_enough(of: str) -> None:
    s = streams(2, 70, 5, True)
    expected, found = gradients(ssd_chunked, s, of), gradients(ssd, s, of)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("wanted", [("C",), ("dt", "A", "B", "C", "D", "initial_state")])
def test_without_a_skip_and_of_some_arguments_only(wanted: tuple[str, ...]) -> None:
    s = streams(2, 70, 5, True) | ({} if "D" in wanted else {"D": None})
    leaves = {name: s[name].clone().requires_grad_() for name in wanted}
    results = [
        torch.autograd.grad(scan(**s | leaves)[0].sin().sum(), list(leaves.values())) for scan in (ssd_chunked, ssd)
    ]
    torch.testing.assert_close(results[1], results[0])


def test_a_head_that_forgets_at_once_gets_a_gradient_of_its_decay() -> None:
    """The gradient of log a is 1e-6 of what a token writes and reads itself; that must not drown it in rounding."""
    s = streams(1, 40, 16, False) | {"A": torch.full((8,), -14.0).double()}
    s["dt"] = torch.ones_like(s["dt"])
    expected = gradients(ssd_chunked, s, "y")["A"]
    found = gradients(ssd, {name: None if part is None else part.float() for name, part in s.items()}, "y")["A"]
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)


def test_gradients_do_not_depend_on_threads() -> None:
    s = {name: part.float() for name, part in streams(2, 130, 16, True).items()}
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(gradients(ssd, s))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_strided_arguments() -> None:
    s = streams(2, 30, 8, True)
    strided = {k: v.transpose(0, 1).contiguous().transpose(0, 1) if k in "xBCdt" else v for k, v in s.items()}
    expected, found = gradients(ssd, s), gradients(ssd, strided)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-11)
