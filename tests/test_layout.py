"""The index arithmetic, against tensors that are labelled element by element."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ghostssm.errors import LayoutError
from ghostssm.models.layout import SSDLayout

layouts = st.builds(
    lambda groups, per_group, head_dim, state, kernel: SSDLayout(
        5, groups * per_group, head_dim, groups, state, kernel
    ),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 9),
    st.integers(1, 4),
)


def labels(layout: SSDLayout) -> list[tuple[object, ...]]:
    """What every row of in_proj is, written out in the documented order."""
    inner = [(head, p) for head in range(layout.num_heads) for p in range(layout.head_dim)]
    state = [(group, n) for group in range(layout.n_groups) for n in range(layout.state_size)]
    return (
        [("z", *i) for i in inner]
        + [("x", *i) for i in inner]
        + [("B", *i) for i in state]
        + [("C", *i) for i in state]
        + [("dt", head) for head in range(layout.num_heads)]
    )


@st.composite
def layouts_with_kept(draw: st.DrawFn) -> tuple[SSDLayout, list[list[int]]]:
    layout = draw(layouts)
    width = draw(st.integers(1, layout.state_size))
    channels = st.lists(st.integers(0, layout.state_size - 1), unique=True, max_size=width).map(sorted)
    kept = [draw(channels) for _ in range(layout.n_groups)]
    return layout, [group + [-1] * (width - len(group)) for group in kept]


@given(layouts)
def test_row_counts_and_slices(layout: SSDLayout) -> None:
    rows = labels(layout)
    assert layout.in_proj_rows == len(rows)
    assert {row[0] for row in rows[layout.in_proj_B]} == {"B"}
    assert {row[0] for row in rows[layout.in_proj_C]} == {"C"}
    conv = [row for row in rows if row[0] in "xBC"]
    assert layout.conv_dim == len(conv)
    assert conv[layout.conv_B] == rows[layout.in_proj_B]
    assert conv[layout.conv_C] == rows[layout.in_proj_C]


@given(layouts_with_kept())
def test_indices_pick_the_named_rows(case: tuple[SSDLayout, list[list[int]]]) -> None:
    layout, kept = case
    rows = labels(layout)
    width = len(kept[0])
    smaller = labels(layout.with_state_size(width))
    picked = [None if index < 0 else rows[index] for index in layout.in_proj_index(kept).tolist()]
    assert len(picked) == len(smaller)
    for new, old in zip(smaller, picked, strict=True):
        if new[0] in ("B", "C"):
            _, group, position = new
            channel = kept[group][position]
            assert old == (None if channel < 0 else (new[0], group, channel))
        else:
            assert old == new
    conv = [row for row in rows if row[0] in "xBC"]
    picked_conv = [None if index < 0 else conv[index] for index in layout.conv_index(kept).tolist()]
    inner = layout.intermediate_size
    assert picked_conv == picked[inner : len(picked) - layout.num_heads]


@given(layouts)
def test_splits_agree_with_the_labels(layout: SSDLayout) -> None:
    rows = labels(layout)
    z, xBC, dt = layout.split_in_proj(torch.arange(layout.in_proj_rows).view(1, 1, -1))
    assert [rows[i][0] for i in z.flatten()] == ["z"] * layout.intermediate_size
    assert [rows[i] for i in dt.flatten()] == [("dt", head) for head in range(layout.num_heads)]
    x, B, C = layout.split_conv(xBC)
    for name, part in (("x", x), ("B", B), ("C", C)):
        for first in range(part.shape[2]):
            for second in range(part.shape[3]):
                assert rows[part[0, 0, first, second]] == (name, first, second)


@pytest.mark.parametrize(
    "sizes", [(0, 8, 8, 1, 16, 4), (32, 8, 8, 1, -1, 4), (32, 8, 8, 3, 16, 4), (32, 8, 8, 1, 1.5, 4)]
)
def test_impossible_sizes_are_refused(sizes: tuple[int, ...]) -> None:
    with pytest.raises(LayoutError):
        SSDLayout(*sizes)
