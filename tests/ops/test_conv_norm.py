"""The backward passes of the convolution and of the gated norm: `gradcheck`, and autograd through plain operations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ghostssm.ops import compiled
from ghostssm.ops.conv_norm import causal_conv, gated_rms_norm, multiplied_rms_norm
from tests.programs import in_process

pytestmark = pytest.mark.skipif(not compiled.HAS_KERNELS, reason="numba is not installed")


def drawn(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def results(function: Callable[..., Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """What a function gives, and the gradients of uneven weights on it."""
    out = function(*leaves)
    weights = torch.cos(torch.arange(out.numel())).view_as(out).to(out)
    return [out, *torch.autograd.grad((out * weights).sum(), leaves)]


def without_loops(function: Callable[..., Tensor], leaves: list[Tensor]) -> list[Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "kernels", None)
        return results(function, leaves)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("length", "width"), [(7, 4), (2, 4), (5, 1)])
def test_gradients_of_the_convolution(length: int, width: int, bias: bool) -> None:
    leaves = drawn((2, length, 3), (3, width), (3,))

    def convolved(x: Tensor, weight: Tensor, offset: Tensor | None = None) -> Tensor:
        return causal_conv(x, weight, offset)

    assert torch.autograd.gradcheck(convolved, tuple(leaves if bias else leaves[:2]))
    torch.testing.assert_close(results(convolved, leaves), without_loops(convolved, leaves))


@pytest.mark.parametrize("gate_first", [True, False])
@pytest.mark.parametrize("groups", [1, 3])
def test_gradients_of_the_norm(groups: int, gate_first: bool) -> None:
    leaves = drawn((2, 5, 12), (2, 5, 12), (12,))

    def normed(y: Tensor, z: Tensor, weight: Tensor) -> Tensor:
        return gated_rms_norm(y, z, weight, 1e-3, groups, gate_first=gate_first)

    def of_a_fixed_gate(y: Tensor, weight: Tensor) -> Tensor:
        gate = leaves[1].detach()
        return multiplied_rms_norm(y, gate, weight, 1e-3, groups, gate_first=gate_first)

    assert torch.autograd.gradcheck(normed, tuple(leaves))
    torch.testing.assert_close(results(normed, leaves), without_loops(normed, leaves))
    torch.testing.assert_close(results(of_a_fixed_gate, leaves[::2]), without_loops(of_a_fixed_gate, leaves[::2]))


def test_a_weight_of_fewer_bits() -> None:
    """The norm's weight as models in bfloat16 have it, with y in float32."""
    y, z = drawn((1, 40, 64), (1, 40, 64), dtype=torch.float32)
    weight = drawn((64,), dtype=torch.bfloat16)[0]

    def normed(*leaves: Tensor) -> Tensor:
        return gated_rms_norm(*leaves, eps=1e-5, groups=2)

    found, expected = results(normed, [y, z, weight]), without_loops(normed, [y, z, weight])
    for mine, other in zip(found, expected, strict=True):
        assert mine.dtype == other.dtype
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5 if other.dtype == torch.float32 else 2e-2)


def test_gradients_do_not_depend_on_threads() -> None:
    leaves = drawn((3, 50, 12), (12, 4), (12,), dtype=torch.float32)
    threads, found = torch.get_num_threads(), []

    def gated(y: Tensor, weight: Tensor) -> Tensor:
        return gated_rms_norm(y, y + 1, weight, 1e-5, 2)

    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            normed = results(gated, [leaves[0], leaves[2]])
            found.append([*results(causal_conv, leaves), *normed])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


ROUNDED = """
import hashlib, torch
from ghostssm.ops._channel_kernels import channel_scan
from ghostssm.ops._row_kernels import half_scan
from ghostssm.ops.conv_norm import causal_conv, gated_rms_norm
from ghostssm.ops.state_format import FORMATS, StateStorage, quantise
from ghostssm.ops.stored import stored_scan_
from tests.programs import in_process
torch.manual_seed(0)
y, z, norm, taps, bias = (torch.randn(s).requires_grad_() for s in ((2, 41, 48), (2, 41, 48), (48,), (48, 4), (48,)))
for gate_first in (True, False):
    out = gated_rms_norm(causal_conv(y, taps, bias), z, norm, 1e-5, 2, gate_first=gate_first)
    for part in (out, *torch.autograd.grad(out.pow(3).sum(), (y, z, norm, taps, bias))):
        print(hashlib.sha256(part.detach().contiguous().numpy().tobytes()).hexdigest())
x, dt, A, B, C, D = (torch.randn(s) for s in ((2, 9, 4, 6), (2, 9, 4), (4,), (2, 9, 2, 40), (2, 9, 2, 40), (4,)))
rounded = [form for form in FORMATS.values() if form.name != "float32"]
for form in rounded:
    stored = quantise(torch.randn(2, 4, 6, 40), StateStorage(form))
    y = stored_scan_(stored, StateStorage(form), x, dt.exp(), -A.exp(), B, C, D)
    for part in (y, stored):
        print(hashlib.sha256(part.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest())
scans = [half_scan(form.kind, 40, False) for form in rounded if not form.scaled]
scans += [channel_scan(form.kind, 6, False) for form in rounded if form.bits == 8]  # int4 takes that of int8
print(sum(sum(scan.stats.cache_misses.values()) for scan in scans))
"""


@pytest.mark.slow
def test_code_from_numbas_cache_rounds_as_when_it_was_compiled(tmp_path: Path) -> None:
    """Else a run that goes on in a new process would end with other bits."""
    both = [in_process(ROUNDED, environment={"NUMBA_CACHE_DIR": str(tmp_path)}) for _ in range(2)]
    assert [done.returncode for done in both] == [0, 0], both
    (*compiled_now, misses), (*found, misses_again) = (done.stdout.split() for done in both)
    assert found == compiled_now
    assert len(found) == 22
    assert (misses, misses_again) == ("4", "0")  # also code that is made for a size is kept
