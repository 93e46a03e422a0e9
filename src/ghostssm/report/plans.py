"""What a page and a notebook say of a plan; unlike figures it needs no library of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from ghostssm.plan.plan import Plan


def kept_channels(plan: Plan, name: str) -> Tensor:
    """(g, n), whether a plan keeps a mixer's channels; of a projection, its directions."""
    kept = torch.zeros(plan.n_groups, plan.state_size, dtype=torch.bool)
    if name in plan.projections:
        kept[:, : plan.projections[name].B.shape[-1]] = True
        return kept
    for group, channels in enumerate(plan.selections[name].kept):
        kept[group, list(channels)] = True
    return kept


def kept_share(plan: Plan) -> float:
    """Of all channels of all layers, the share that stays; of projections, the share of directions."""
    return sum(kept_channels(plan, name).double().mean().item() for name in plan.selections) / len(plan.selections)


def has_scores(plan: Plan) -> bool:
    """Whether every mixer of a plan has a score for each of its channels."""
    shape = (plan.n_groups, plan.state_size)
    return all(name in plan.scores and plan.scores[name].shape == shape for name in plan.selections)


def sizes_text(plan: Plan) -> str:
    """The state size of the pruned model, or the range where layers have their own."""
    sizes = plan.state_sizes if plan.needs_own_class else (plan.kept_state_size,)
    return f"{sizes[0]}" if len(set(sizes)) == 1 else f"{min(sizes)} to {max(sizes)}"
