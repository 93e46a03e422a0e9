"""Choose channels together: the set whose removal changes the output least, correlations included.

The error of removing a set R is the quadratic form 1_R^T G 1_R of a Gram matrix G. Finding the best R is a binary
quadratic programme; greedy elimination and greedy addition, each followed by exchanges, find a set that no swap of two
channels improves.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ghostssm.methods.base import Evidence, Method, register_method
from ghostssm.methods.selection import Cut, selection_of
from ghostssm.plan.decision import Decision, Selection

SHARES = (0.0, 0.7, 1.0)
"""Of the norm's derivative (`ghostssm.calibration.samples`)."""


def least_error_set(
    gram: NDArray[np.float64], groups: Sequence[int] | NDArray[np.int_], removed: Sequence[int]
) -> NDArray[np.bool_]:
    """The channels to remove, as a mask.

    From two sides: channels go one by one, always the one that costs least; and all are gone and come back one by one,
    always the one that is missed most, which sees channels that cancel each other. Exchanges improve both; the better
    one counts.

    Args:
        gram: (c, c), symmetric, positive semidefinite. groups: (c,), the group of each channel.
        removed: how many channels each group loses.
    """
    label = np.asarray(groups)
    kept = np.bincount(label, minlength=len(removed)) - np.asarray(removed)
    down = _greedy(gram, label, np.zeros(len(gram), dtype=bool), np.array(removed))
    up = _greedy(gram, label, np.ones(len(gram), dtype=bool), kept)
    candidates = [_exchanged(gram, label, start) for start in (down, up)]
    return min(candidates, key=lambda gone: float(gone @ gram @ gone))


def _greedy(
    gram: NDArray[np.float64], label: NDArray[np.int_], gone: NDArray[np.bool_], moves: NDArray[np.int_]
) -> NDArray[np.bool_]:
    """Move channels, each once, to the other side of ``gone``, as many of each group as ``moves`` says."""
    gone, left, moved = gone.copy(), moves.copy(), np.zeros(len(gram), dtype=bool)
    sign = -1 if gone.all() else 1
    pull = gram @ gone
    for _ in range(left.sum()):
        change = np.where(moved | (left[label] == 0), np.inf, gram.diagonal() + sign * 2 * pull)
        channel = int(change.argmin())
        gone[channel], moved[channel] = sign > 0, True
        left[label[channel]] -= 1
        pull += sign * gram[channel]
    return gone


def _exchanged(gram: NDArray[np.float64], label: NDArray[np.int_], start: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Exchange two channels of a group, the best pair first, until no exchange lowers the error."""
    gone, diagonal = start.copy(), gram.diagonal()
    pull = gram @ gone
    tolerance = 1e-12 * max(float(diagonal.sum()), 1e-300)
    while True:
        out, back = np.flatnonzero(~gone), np.flatnonzero(gone)
        change = (diagonal + 2 * pull)[out][:, None] + (diagonal - 2 * pull)[back][None, :]
        change = change - 2 * gram[np.ix_(out, back)]
        change[label[out][:, None] != label[back][None, :]] = np.inf
        if not change.size or change.min() > -tolerance:
            return gone
        i, j = np.unravel_index(int(change.argmin()), change.shape)
        gone[out[i]], gone[back[j]] = True, False
        pull += gram[out[i]] - gram[back[j]]


def choose_from_gram(gram: Tensor, n_groups: int, cut: Cut) -> Selection:
    """The channels that stay, by a Gram matrix (g * n, g * n)."""
    pools = 1 if cut.groups == "pooled" else n_groups
    lost = len(gram) - n_groups * cut.state_size
    gone = least_error_set(gram.cpu().numpy(), np.arange(pools).repeat(len(gram) // pools), [lost // pools] * pools)
    return selection_of(torch.from_numpy(~gone).view(n_groups, -1))


def single(evidence: Evidence) -> Tensor:
    """sqrt(G_nn): the root mean squared change of the block's output from removing channel n alone."""
    layout = evidence.layout
    return evidence.samples.output_gram().diagonal().sqrt().view(layout.n_groups, layout.state_size)


def decide(evidence: Evidence, cut: Cut) -> Decision:
    """The set of channels whose joint removal changes the block's output least.

    The best for several shares of the norm's derivative, and of these the one that is measured to be best.
    """
    grams = (evidence.samples.output_gram(share) for share in SHARES)
    choices = dict.fromkeys(choose_from_gram(gram, evidence.layout.n_groups, cut) for gram in grams)
    return evidence.least_change([Decision(choice) for choice in choices])


register_method(Method("output-single", "change of the block's output, channel by channel", single))
register_method(Method("output", "change of the block's output, removed channels together", single, decide=decide))
