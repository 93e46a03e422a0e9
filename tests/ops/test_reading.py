"""States read at some tokens, against a loop that has every state in hand, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from ghostssm.ops import compiled
from ghostssm.ops.reading import read_states, read_states_chunked
from ghostssm.ops.ssd import ssd_step
from tests.ops.test_ssd import streams

CASES = [
    # groups, tokens, n, positions, initial state
    (1, 37, 6, range(1, 37, 3), False),
    (2, 70, 33, [0, 5, 6, 64, 69], True),
    (4, 9, 130, range(9), True),
    (1, 12, 256, [11], True),
    (2, 5, 1, [], True),
]
cases = pytest.mark.parametrize(("groups", "length", "n", "positions", "initial"), CASES)


def read_states_reference(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, u: Tensor, positions: Sequence[int], state: Tensor
) -> tuple[Tensor, Tensor]:
    """Token by token; arguments and results as `read_states` has them."""
    (b, length, _, _), (g, n), reads = x.shape, B.shape[2:], []
    for t in range(length):
        _, state = ssd_step(state, x[:, t], dt[:, t], A, B[:, t], B[:, t])
        if t in positions:
            here = u[:, list(positions).index(t)].unflatten(1, (g, -1))
            reads.append(torch.einsum("bgkdp,bgkpn->bgdn", here, state.unflatten(1, (g, -1))))
    return torch.stack(reads, 1) if reads else x.new_zeros(b, 0, g, u.shape[3], n), state


def check(
    read: Callable[..., tuple[Tensor, Tensor]],
    groups: int,
    length: int,
    n: int,
    positions: Sequence[int],
    initial: bool,
    dtype: torch.dtype,
) -> None:
    s = streams(groups, length, n, initial)
    given = [s[name] for name in ("x", "dt", "A", "B")]
    b, _, h, p = s["x"].shape
    u = torch.randn(b, len(positions), h, 5, p, dtype=torch.float64)
    state = s["initial_state"] if initial else torch.zeros(b, h, p, n, dtype=torch.float64)
    expected = read_states_reference(*given, u, positions, state)
    before = state.clone()
    *given, u, state = (part.to(dtype) for part in (*given, u, state))
    for found, exact in zip(read(*given, u, positions, state if initial else None), expected, strict=True):
        assert found.shape == exact.shape
        assert (found.double() - exact).norm() <= (1e-12 if dtype == torch.float64 else 2e-6) * exact.norm()
    assert torch.equal(state, before.to(dtype))


@cases
@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_chunks(groups: int, length: int, n: int, positions: Sequence[int], initial: bool, chunk: int) -> None:
    def read(*given: object) -> tuple[Tensor, Tensor]:
        return read_states_chunked(*given, chunk_size=chunk)  # type: ignore[arg-type]

    check(read, groups, length, n, positions, initial, torch.float64)


@pytest.mark.skipif(not compiled.HAS_KERNELS, reason="numba is not installed")
@cases
def test_the_compiled_loop(
    groups: int, length: int, n: int, positions: Sequence[int], initial: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ghostssm.ops.reading.read_states_chunked", None)
    check(read_states, groups, length, n, positions, initial, torch.float32)
