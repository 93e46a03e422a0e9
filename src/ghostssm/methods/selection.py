"""From scores to the channels that stay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ghostssm.errors import NumericalError
from ghostssm.plan.plan import Selection

Groups = Literal["equal", "pooled"]
"""equal: every group keeps the same number of channels. pooled: the groups of a layer compete (the paper's rule)."""


def select(scores: Tensor, state_size: int, groups: Groups) -> Selection:
    """The highest-scoring channels of one layer; of equal scores the lower index wins.

    Args:
        scores: (g, n). state_size: channels per group, on average if the groups are pooled.
    """
    if groups == "equal":
        kept = torch.zeros_like(scores, dtype=torch.bool)
        return _selection(kept.scatter(1, _best(scores, state_size), True))
    return select_together([scores], state_size)[0]


def select_together(scores: Sequence[Tensor], state_size: int) -> list[Selection]:
    """The highest-scoring channels of several layers under one threshold, ``state_size`` per group on average."""
    flat = torch.cat([s.flatten() for s in scores])
    budget = state_size * sum(s.shape[0] for s in scores)
    kept = torch.zeros_like(flat, dtype=torch.bool)
    kept[_best(flat, budget)] = True
    parts = torch.split(kept, [s.numel() for s in scores])
    return [_selection(part.view_as(s)) for part, s in zip(parts, scores, strict=True)]


def _best(scores: Tensor, count: int) -> Tensor:
    if not torch.isfinite(scores).all():
        raise NumericalError("NaN or Inf among the channel scores; check the checkpoint's weights and the text.")
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def _selection(kept: Tensor) -> Selection:
    return Selection(tuple(tuple(group.nonzero().flatten().tolist()) for group in kept))
