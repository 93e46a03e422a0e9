"""Channel energies against the definition, and against actually zeroing channels."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ghostssm.ops import compiled
from ghostssm.ops.energy import channel_energies, channel_energies_chunked, channel_energies_reference
from ghostssm.ops.ssd import ssd_reference
from tests.ops.test_ssd import CASES, in_float32, streams


def without_skip(s: dict) -> dict:
    return {key: value for key, value in s.items() if key != "D"}


@pytest.mark.parametrize(("groups", "length", "chunk", "n", "initial"), CASES)
def test_chunked_energies_equal_the_definition(groups: int, length: int, chunk: int, n: int, initial: bool) -> None:
    s = without_skip(streams(groups, length, n, initial))
    expected = channel_energies_reference(**s)
    found = channel_energies_chunked(**s, chunk_size=chunk)
    for name in ("output", "state", "readout"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-11, atol=0)


@pytest.mark.skipif(not compiled.HAS_KERNELS, reason="numba is not installed")
@pytest.mark.parametrize(("groups", "length", "chunk", "n", "initial"), CASES)
def test_compiled_energies_equal_the_definition(groups: int, length: int, chunk: int, n: int, initial: bool) -> None:
    s = without_skip(streams(groups, length, n, initial, head_dim=40))
    expected = channel_energies_reference(**s)
    found = channel_energies(**in_float32(s))
    for name in ("output", "state", "readout"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=2e-5, atol=0)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_output_energy_is_the_squared_change_of_y(groups: int) -> None:
    s = streams(groups, 37, 6, True)
    y, _ = ssd_reference(**s)
    energy = channel_energies(**without_skip(s)).output
    for group in range(groups):
        for channel in range(6):
            C = s["C"].clone()
            C[:, :, group, channel] = 0
            changed, _ = ssd_reference(**(s | {"C": C}))
            torch.testing.assert_close((y - changed).square().sum(), energy[group, channel], rtol=1e-10, atol=0)


@pytest.mark.parametrize("energies", [channel_energies, channel_energies_chunked])
def test_float32_stays_close_where_decay_is_slow_and_inputs_are_correlated(energies: Any) -> None:
    """The case in which the energy's recurrence cancels most: long memory, alternating signs."""
    s = without_skip(streams(1, 512, 16, False))
    s["A"] = torch.full_like(s["A"], -1e-3)
    s["x"] = s["x"][:, :1] * (-1.0) ** torch.arange(512, dtype=torch.float64)[None, :, None, None]
    exact = channel_energies_reference(**s)
    rounded = energies(**in_float32(s))
    torch.testing.assert_close(rounded.output, exact.output, rtol=1e-4, atol=0)


def test_energies_add_up_over_batches() -> None:
    s = without_skip(streams(2, 20, 5, True))
    whole = channel_energies(**s)
    halves = [channel_energies(**{k: v if k == "A" else v[i : i + 1] for k, v in s.items()}) for i in range(2)]
    for name in ("output", "state", "readout"):
        torch.testing.assert_close(sum(getattr(half, name) for half in halves), getattr(whole, name))
