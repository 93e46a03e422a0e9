"""States in tiers: against int8 and int4 by hand, and compiled loops against the readable reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ghostssm.errors import InputError
from ghostssm.ops import compiled
from ghostssm.ops.state_format import TIERS, StateFormat, StateStorage, dequantise, quantise
from ghostssm.ops.stored import ssd_stored, stored_scan_, stored_scan_reference

TIERED = ((5, 3), (0, 4), (0, 0), (9, 0))
N, P = 9, 37
roundings = pytest.mark.parametrize("rounding", ["nearest", "stochastic"])


def storage(rounding: str = "nearest") -> StateStorage:
    return StateStorage.of("tiers", rounding, seed=7).with_tiers(TIERED).at(2, 11)


def streams(length: int, groups: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """x, dt, A, B, C, D of two sequences."""
    x, dt = torch.randn(2, length, 4, P, dtype=dtype), torch.rand(2, length, 4, dtype=dtype)
    B, C = torch.randn(2, 2, length, groups, N, dtype=dtype)
    return x, dt, -torch.rand(4, dtype=dtype), B, C, torch.randn(4, dtype=dtype)


def rounded_by_hand(state: Tensor) -> Tensor:
    """A state (b, 4, p, n) in float64, every number rounded in its head's tier."""
    found = torch.zeros_like(state)
    for head, (wide, narrow) in enumerate(TIERED):
        for tier, largest in ((slice(0, wide), 127), (slice(wide, wide + narrow), 7)):
            if wide + narrow:
                peak = state[:, head, :, : wide + narrow].abs().amax(-1, keepdim=True)
                numbers = (state[:, head, :, tier] / peak * largest).nan_to_num().round()
                found[:, head, :, tier] = numbers * peak / largest
    return found


def test_rounding_is_that_of_its_definition(fresh_seed: int) -> None:
    state = torch.randn(3, 4, P, N)
    state[1, 0, 2] = 0
    stored = quantise(state, storage())
    assert stored.shape[0] == 3
    assert storage().format.state_bytes(4 * P, N) == P * ((5 + 2 + 4) + (2 + 4) + 0 + (9 + 4))
    found = dequantise(stored, storage().format, P, N)
    torch.testing.assert_close(found.double(), rounded_by_hand(state.double()), rtol=1e-5, atol=1e-5)


def test_a_scan_rounds_after_every_token(fresh_seed: int) -> None:
    """The recurrence in float64, head by head, of the channels that a head stores."""
    x, dt, A, B, C, D = streams(6, 2, torch.float64)
    state, expected = torch.zeros(2, 4, P, N, dtype=torch.float64), []
    kept = torch.tensor([[channel < wide + narrow for channel in range(N)] for wide, narrow in TIERED])
    for t in range(6):
        here, read = (part[:, t].repeat_interleave(2, dim=1) * kept for part in (B, C))
        added = dt[:, t, :, None, None] * x[:, t, ..., None] * here[:, :, None]
        state = torch.exp(dt[:, t] * A)[..., None, None] * state + added
        expected.append((state * read[:, :, None]).sum(-1) + D[:, None] * x[:, t])
        state = rounded_by_hand(state)
    single = [part.float() for part in (x, dt, A, B, C, D)]
    y, stored = ssd_stored(*single, None, storage(), every_token=True)
    scale = float(torch.stack(expected).abs().max())
    # In float32 a number on the edge between two levels may fall to either side, which few do.
    off = (y.double() - torch.stack(expected, dim=1)).abs()
    assert (off > 1e-4 * scale).double().mean() < 0.02
    assert off.max() < 0.1 * scale
    assert stored.dtype == torch.uint8


@pytest.mark.skipif(not compiled.HAS_KERNELS, reason="numba is not installed")
@roundings
@pytest.mark.parametrize("groups", [1, 4])
def test_compiled_loops_are_the_reference(rounding: str, groups: int) -> None:
    torch.manual_seed(groups)
    stored = quantise(torch.randn(2, 4, P, N), storage(rounding))
    given = streams(3, groups)
    y, after = stored_scan_reference(stored, storage(rounding), *given)
    found = stored_scan_(stored, storage(rounding), *given)
    expected, got = (dequantise(each, storage().format, P, N) for each in (after, stored))
    assert ((got - expected).abs() > 1e-5 * expected.abs().max()).float().mean() < 0.01
    assert ((found - y).abs() > 1e-4 * y.abs().max()).float().mean() < 0.02


def test_stochastic_rounding_is_right_on_average(fresh_seed: int) -> None:
    state = torch.randn(1, 4, 1, N)
    many = StateStorage.of("tiers", "stochastic", fresh_seed).with_tiers(TIERED)
    found = dequantise(quantise(state.expand(4000, -1, -1, -1), many), many.format, 1, N).double().mean(0)
    for head, (wide, narrow) in enumerate(TIERED):
        kept = state[0, head, :, : wide + narrow]
        bound = 5 * (kept.abs().max() if wide + narrow else 0) / 7 / 2 / 4000**0.5
        assert ((found[head, :, : wide + narrow] - kept).abs() <= bound).all()


def test_a_mixer_without_tiers_is_refused() -> None:
    assert StateFormat.of("tiers") is TIERS
    with pytest.raises(InputError, match=r"does not say how many channels.*--state-bytes"):
        StateStorage.of("tiers").with_tiers(None)
    assert StateStorage.of("int8").with_tiers(None) == StateStorage.of("int8")
