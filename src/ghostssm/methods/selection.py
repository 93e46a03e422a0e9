"""From scores to the channels that stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ghostssm.choices import Groups
from ghostssm.errors import NumericalError
from ghostssm.plan.decision import Selection


@dataclass(frozen=True)
class Cut:
    """How far a mixer's state is to be cut.

    Attributes:
        state_size: N', channels per group; on average if the groups are pooled.
        groups: how the groups of a layer share the state: ``equal``, the same number of channels in each, or
            ``pooled``, where they compete.
    """

    state_size: int
    groups: Groups = "equal"


def select(scores: Tensor, cut: Cut) -> Selection:
    """The highest-scoring channels of one layer, from scores (g, n); of equal scores the lower index wins."""
    if cut.groups == "equal":
        kept = torch.zeros_like(scores, dtype=torch.bool)
        return selection_of(kept.scatter(1, _best(scores, cut.state_size), True))
    return select_together([scores], cut.state_size)[0]


def select_together(scores: Sequence[Tensor], state_size: int) -> list[Selection]:
    """The highest-scoring channels of several layers under one threshold, ``state_size`` per group on average."""
    flat = torch.cat([s.flatten() for s in scores])
    budget = state_size * sum(s.shape[0] for s in scores)
    kept = torch.zeros_like(flat, dtype=torch.bool)
    kept[_best(flat, budget)] = True
    parts = torch.split(kept, [s.numel() for s in scores])
    return [selection_of(part.view_as(s)) for part, s in zip(parts, scores, strict=True)]


def _best(scores: Tensor, count: int) -> Tensor:
    if not torch.isfinite(scores).all():
        raise NumericalError("NaN or Inf among the channel scores; check the checkpoint's weights and the text.")
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def selection_of(kept: Tensor) -> Selection:
    """From (g, n), bool: whether a channel stays."""
    return Selection(tuple(tuple(group.nonzero().flatten().tolist()) for group in kept))
