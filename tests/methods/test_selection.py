"""From scores to channels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ghostssm.errors import NumericalError
from ghostssm.methods.selection import Cut, select, select_together


@given(st.integers(1, 4), st.integers(1, 12), st.data())
def test_equal_groups_keep_their_best(groups: int, n: int, data: st.DataObject) -> None:
    r = data.draw(st.integers(1, n))
    scores = torch.tensor(
        data.draw(st.lists(st.lists(st.integers(0, 5), min_size=n, max_size=n), min_size=groups, max_size=groups))
    )
    kept = select(scores.double(), Cut(r)).kept
    for group, channels in enumerate(kept):
        assert len(channels) == r
        assert list(channels) == sorted(set(channels))
        ranked = sorted(range(n), key=lambda c: (-scores[group, c].item(), c))
        assert set(channels) == set(ranked[:r])


def test_pooled_groups_compete() -> None:
    scores = torch.tensor([[9.0, 8.0, 7.0, 6.0], [5.0, 1.0, 1.0, 1.0]])
    assert select(scores, Cut(2, "pooled")).kept == ((0, 1, 2, 3), ())
    assert select(scores, Cut(2)).kept == ((0, 1), (0, 1))


def test_layers_compete_under_one_threshold() -> None:
    first, second = torch.tensor([[3.0, 2.0, 9.0]]), torch.tensor([[1.0, 8.0, 0.0]])
    assert [s.kept for s in select_together([first, second], 2)] == [((0, 1, 2),), ((1,),)]


def test_scores_that_are_not_finite_are_refused() -> None:
    with pytest.raises(NumericalError):
        select(torch.tensor([[1.0, float("nan")]]), Cut(1))
