"""Copying over a long distance: the loss of tokens that repeat what was read hundreds of tokens before.

A token is copied if it ends an n-gram that the window has seen before, but not lately. The convolutions reach a few
tokens back and the text just before holds nothing to repeat, so that only the state (or attention) can supply it. Such
tokens are few: a mean over all tokens hides them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ghostssm.errors import InputError, TextError
from ghostssm.evaluation.perplexity import token_losses
from ghostssm.plan.measurement import Difference
from ghostssm.progress import Progress, silent
from ghostssm.text.windows import Windows

CONTEXT = 3
"""Tokens that must be the same before a copied token; with itself a 4-gram."""
DISTANCE = 256
"""Tokens back to the nearest earlier occurrence, at least."""
_PIECES_PER_DISTANCE = 4


@dataclass(frozen=True)
class PositionLosses:
    """Losses at some positions of every window.

    Attributes:
        sums: (count,), float64: the losses at a window's positions, added up, nats.
        counts: (count,), int64: how many positions these are; may be 0 in some windows, not in all.
    """

    sums: Tensor
    counts: Tensor

    @property
    def mean(self) -> float:
        """Nats per token."""
        return (self.sums.sum() / self.counts.sum()).item()

    def excess_over(self, dense: PositionLosses) -> Difference:
        """This mean minus the dense model's at the same positions, with its standard error over windows.

        Windows differ in how many positions count, so the error is that of a ratio of two sums (Cochran, Sampling
        Techniques, 1977, section 6.3); with equal counts it is the usual one. NaN when all positions are in one window.
        """
        windows, positions = int((self.counts > 0).sum()), int(self.counts.sum())
        differences = self.sums - dense.sums
        mean = differences.sum().item() / positions
        if windows < 2:
            return Difference(mean, math.nan)
        residuals = differences - mean * self.counts
        error = math.sqrt(residuals.square().sum().item() * windows / (windows - 1)) / positions
        return Difference(mean, error)


@dataclass(frozen=True)
class Copying:
    """Losses at copied positions, and at all others but each window's first."""

    copied: PositionLosses
    elsewhere: PositionLosses


def copied_positions(ids: Tensor, context: int = CONTEXT, distance: int = DISTANCE) -> Tensor:
    """Which tokens are copied from far back.

    A token is copied if it and the ``context`` tokens before it occurred before in its window, and the nearest such
    occurrence lies at least ``distance`` tokens back.

    Args:
        ids: (count, length), int64, not negative; rows are windows of their own.

    Returns:
        (count, length), bool.

    Raises:
        InputError: a context below 1 or a distance below 2.
    """
    if context < 1 or distance < 2:
        raise InputError(f"A context of {context} and a distance of {distance} tokens; expected at least 1 and 2.")
    count, length = ids.shape
    copied = torch.zeros(count, length, dtype=torch.bool, device=ids.device)
    if length <= context:
        return copied
    # Every different n-gram of a window gets a number: the numbers of its first n - 1 tokens and of the last, paired.
    gram = torch.arange(count, device=ids.device)[:, None].expand(count, length)
    tokens = int(ids.max()) + 1
    for offset in range(context + 1):
        shorter = gram[:, : length - context]
        next_token = ids[:, offset : length - context + offset]
        gram = torch.unique(shorter * tokens + next_token, return_inverse=True)[1]
    numbers, order = gram.flatten().sort(stable=True)
    again = numbers[1:] == numbers[:-1]
    far = order[1:] - order[:-1] >= distance  # of one window, since n-grams of two windows have different numbers
    at_start = torch.zeros_like(order, dtype=torch.bool)
    at_start[order[1:]] = again & far
    copied[:, context:] = at_start.view(count, -1)
    return copied


def copying(
    model: PreTrainedModel,
    windows: Windows,
    context: int = CONTEXT,
    distance: int = DISTANCE,
    progress: Progress = silent,
) -> Copying:
    """The model's loss at copied positions and elsewhere.

    Raises:
        InputError, TextError: see `copied_positions`; windows that are too short or in which nothing is copied.
        NumericalError: a loss that is not finite.
    """
    copied = _copied_in(windows, context, distance)
    return _split(token_losses(model, windows, progress), copied)


def copying_in_reach(
    model: PreTrainedModel,
    windows: Windows,
    context: int = CONTEXT,
    distance: int = DISTANCE,
    progress: Progress = silent,
) -> Copying:
    """The control: the losses at the same positions for a model that sees less than ``distance`` tokens back.

    Windows are cut into pieces of ``distance`` tokens that overlap by three quarters, and each piece's last quarter
    counts: every position sees at least three quarters of ``distance``, and none an occurrence that it copies. A model
    that uses its state over such distances does worse here than in `copying`, most of all at copied positions;
    one that doesn't, does not copy, and its losses at these positions say nothing about its state.

    Raises:
        As `copying`.
    """
    copied = _copied_in(windows, context, distance)
    step = max(1, distance // _PIECES_PER_DISTANCE)
    losses = torch.empty(len(windows), windows.length - 1, dtype=torch.float32)
    starts = range(0, max(1, windows.length - distance + step), step)
    for done, start in enumerate(starts):
        progress("pieces", done, len(starts))
        piece = replace(windows, ids=windows.ids[:, start : start + distance])
        first = 1 if start == 0 else distance - step
        losses[:, start + first - 1 : start + distance - 1] = token_losses(model, piece)[:, first - 1 :]
    progress("pieces", len(starts), len(starts))
    return _split(losses, copied)


def _copied_in(windows: Windows, context: int, distance: int) -> Tensor:
    """Whether each token that is predicted is copied: (count, length - 1), bool."""
    copied = copied_positions(windows.ids, context, distance)[:, 1:]
    if windows.length <= distance + context:
        raise InputError(
            f"The windows have {windows.length} tokens; copying over {distance} tokens needs longer ones, such as 1024."
        )
    if not copied.any():
        raise TextError(
            f"In {len(windows)} windows of {windows.text_name!r} no {context + 1} tokens come again after {distance} "
            "or more; give more or longer windows, or another text."
        )
    return copied


def _split(losses: Tensor, copied: Tensor) -> Copying:
    def part(mask: Tensor) -> PositionLosses:
        return PositionLosses((losses.double() * mask).sum(1), mask.sum(1))

    return Copying(part(copied), part(~copied))
