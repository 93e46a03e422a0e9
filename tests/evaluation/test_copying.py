"""Copied positions by brute force, and losses there against transformers' own."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import ghostssm
from ghostssm.errors import InputError, TextError
from ghostssm.evaluation.copying import PositionLosses, copied_positions, copying, copying_in_reach
from tests.conftest import random_windows, tiny_model


def brute_force(ids: Tensor, context: int, distance: int) -> list[list[bool]]:
    found = []
    for row in ids.tolist():
        marks = []
        for position in range(len(row)):
            gram = row[position - context : position + 1] if position >= context else None
            earlier = [p for p in range(context, position) if row[p - context : p + 1] == gram]
            marks.append(bool(earlier) and position - earlier[-1] >= distance)
        found.append(marks)
    return found


@given(
    count=st.integers(1, 4),
    length=st.integers(1, 60),
    tokens=st.integers(1, 5),
    context=st.integers(1, 4),
    distance=st.integers(2, 20),
    seed=st.integers(0, 10**6),
)
def test_copied_positions_equal_those_of_brute_force(
    count: int, length: int, tokens: int, context: int, distance: int, seed: int
) -> None:
    ids = torch.randint(0, tokens, (count, length), generator=torch.Generator().manual_seed(seed))
    assert copied_positions(ids, context, distance).tolist() == brute_force(ids, context, distance)


def test_large_vocabularies_do_not_overflow() -> None:
    ids = torch.randint(0, 4, (2, 50), generator=torch.Generator().manual_seed(0)) * (2**30)
    assert copied_positions(ids, 3, 5).tolist() == brute_force(ids, 3, 5)


def windows_with_copies(count: int = 3, length: int = 90) -> ghostssm.Windows:
    """Random text whose beginning comes again at its end; in the last window it doesn't."""
    windows = random_windows(count, length)
    ids = windows.ids.clone()
    for row in range(count - 1):
        ids[row, 60 : 70 + 5 * row] = ids[row, 3 : 13 + 5 * row]
    return replace(windows, ids=ids)


@pytest.mark.parametrize("n_groups", [1, 2])
def test_losses_are_split_as_the_plain_forward_has_them(n_groups: int) -> None:
    model, windows = tiny_model(n_groups=n_groups), windows_with_copies()
    with torch.inference_mode():
        logits = model(input_ids=windows.ids).logits.double()
    losses = -logits[:, :-1].log_softmax(-1).gather(2, windows.ids[:, 1:, None])[..., 0]
    marks = torch.tensor(brute_force(windows.ids, 3, 32))[:, 1:]
    found = copying(model, windows, distance=32)
    assert found.copied.counts.tolist() == [7, 12, 0]
    assert (found.copied.counts + found.elsewhere.counts).tolist() == [89] * 3
    torch.testing.assert_close(found.copied.sums, (losses * marks).sum(1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.elsewhere.sums, (losses * ~marks).sum(1), rtol=1e-4, atol=1e-4)
    assert found.copied.mean == pytest.approx(losses[marks].mean().item(), rel=1e-4)


@pytest.mark.parametrize(("length", "distance"), [(90, 32), (80, 32), (81, 7), (90, 50), (90, 2)])
def test_in_reach_no_token_sees_what_it_copies(length: int, distance: int) -> None:
    """Each loss by a forward of its own, on the tokens that its piece holds."""
    model, windows = tiny_model(num_hidden_layers=1), windows_with_copies(2, length)
    marks = torch.tensor(brute_force(windows.ids, 3, distance))
    step = max(1, distance // 4)
    sums = torch.zeros(2, 2, dtype=torch.float64)
    for row, position in torch.cartesian_prod(torch.arange(2), torch.arange(1, length)).tolist():
        # The piece's last quarter counts, so pieces begin at every quarter; but none begins before the window.
        start = max(0, (position - distance + step) // step * step)
        assert position - start < distance
        assert start == 0 or position - start >= distance - step
        with torch.inference_mode():
            scores = model(input_ids=windows.ids[row : row + 1, start:position]).logits[0, -1].double()
        loss = scores.logsumexp(0) - scores[windows.ids[row, position]]
        sums[row, int(marks[row, position])] += loss
    found = copying_in_reach(model, windows, distance=distance)
    torch.testing.assert_close(found.copied.sums, sums[:, 1], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(found.elsewhere.sums, sums[:, 0], rtol=1e-4, atol=1e-3)


def test_excess_with_equal_counts_is_the_paired_mean_and_its_error() -> None:
    draw = torch.Generator().manual_seed(0)
    dense, other = torch.rand(2, 12, generator=draw, dtype=torch.float64)
    counts = torch.full((12,), 5)
    excess = PositionLosses(other, counts).excess_over(PositionLosses(dense, counts))
    differences = (other - dense) / 5
    assert excess.mean == pytest.approx(differences.mean().item())
    assert excess.standard_error == pytest.approx(differences.std().item() / math.sqrt(12))


def test_the_error_of_unequal_counts_is_that_of_the_bootstrap() -> None:
    draw = torch.Generator().manual_seed(1)
    counts = torch.randint(0, 30, (200,), generator=draw)
    sums = counts * (0.3 + 0.5 * torch.randn(200, generator=draw, dtype=torch.float64))
    nothing = PositionLosses(torch.zeros(200, dtype=torch.float64), counts)
    drawn = torch.randint(0, 200, (4000, 200), generator=draw)
    bootstrap = (sums[drawn].sum(1) / counts[drawn].sum(1)).std().item()
    found = PositionLosses(sums, counts).excess_over(nothing)
    assert found.mean == pytest.approx(sums.sum().item() / counts.sum().item())
    assert found.standard_error == pytest.approx(bootstrap, rel=0.06)


def test_one_window_has_no_standard_error() -> None:
    one = PositionLosses(torch.tensor([2.0], dtype=torch.float64), torch.tensor([4]))
    assert one.excess_over(one).mean == 0
    assert math.isnan(one.excess_over(one).standard_error)


@pytest.mark.parametrize(("context", "distance"), [(0, 10), (3, 1)])
def test_no_context_or_no_distance_is_an_error(context: int, distance: int) -> None:
    with pytest.raises(InputError, match=f"context of {context} and a distance of {distance}"):
        copied_positions(random_windows(1, 20).ids, context, distance)


def test_windows_in_which_nothing_can_be_copied() -> None:
    with pytest.raises(InputError, match=r"windows have 200 tokens.*256"):
        copying(tiny_model(), random_windows(2, 200))
    with pytest.raises(TextError, match="no 4 tokens come again after 256"):
        copying_in_reach(tiny_model(), random_windows(2, 300))


def test_the_built_in_model_copies_over_hundreds_of_tokens() -> None:
    """A model that did not would lose nothing from never seeing what it copies."""
    checkpoint = ghostssm.load("reference", dtype=torch.float32)
    text = ghostssm.read_text("stdlib", "evaluation")
    windows = ghostssm.cut_windows(text, checkpoint.require_tokenizer(), 768, 16, seed=1)
    found, control = copying(checkpoint.model, windows), copying_in_reach(checkpoint.model, windows)
    gain = control.copied.excess_over(found.copied)
    assert gain.mean > 2 * gain.standard_error
    assert gain.mean > 4 * control.elsewhere.excess_over(found.elsewhere).mean
