"""Choices and defaults that requests share with the rooms below; they are read without importing PyTorch."""

from __future__ import annotations

import os
from typing import Literal

from ghostssm.errors import InputError

Groups = Literal["equal", "pooled"]
"""equal: every group keeps the same number of channels. pooled: the groups of a layer compete (the paper's rule)."""
Rounding = Literal["nearest", "stochastic"]
"""Of a number between two that a dtype has: to the nearer one, or to either, as likely as it is near."""
Trained = Literal["mixers", "small", "all"]
"""Which parameters move: all of the Mamba-2 mixers, those that are no large matrix, or every one."""
DEFAULT_SEED = 42
DEFAULT_RECIPE = "output+refit100+repair"
"""What loses least among the recipes whose results load in stock classes."""
DISTILL_STEPS = 300
DISTILL_RATE = 2e-3
"""Adam's, for a student whose divergence from its teacher is 1; it goes with the root of the divergence."""
HELD_OUT_ONE_IN = 4
"""Of the windows of a search, one in so many measures the excess loss; the others calibrate."""


def processes_started() -> int:
    """Of this run, as torchrun says in the environment variable WORLD_SIZE; 1 without it.

    Raises:
        InputError: it holds no such number.
    """
    given = os.environ.get("WORLD_SIZE", "1")
    if not given.isdecimal() or int(given) < 1:
        raise InputError(
            f"The environment variable WORLD_SIZE is {given!r}; expected the number of processes. torchrun sets it; "
            "without torchrun leave it out."
        )
    return int(given)


def check_divisible(batch: int, accumulate: int, processes: int) -> None:
    """Raise InputError for a batch of windows that can't be divided into parts for so many processes."""
    if batch % (processes * accumulate):
        shared = f" for {processes} processes" if processes > 1 else ""
        raise InputError(
            f"A batch of {batch} windows can't be divided into {accumulate} parts{shared}; expected a multiple of "
            f"{processes * accumulate}."
        )


def check_searchable(windows: int) -> None:
    """Raise InputError for so few calibration windows that none can be held out."""
    if windows < HELD_OUT_ONE_IN:
        raise InputError(
            f"There are {windows} calibration windows; a search needs at least {HELD_OUT_ONE_IN}: "
            f"--windows {HELD_OUT_ONE_IN}."
        )
