"""What a recovery step is, and the registry of steps.

A step of mixer scope gives a pruned mixer back what its output lost, while the walk stands at it. A step of model scope
changes parameters of the whole pruned model once all mixers are decided. A new step is one file and one registration.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ghostssm.calibration.open_block import PrunedBlock
from ghostssm.errors import InputError, unknown_name
from ghostssm.ops.state_format import FLOAT32, INT4
from ghostssm.plan.distillation import Distillation
from ghostssm.progress import Progress
from ghostssm.text.windows import Windows


def held_out(windows: int, first: int = 0) -> Tensor:
    """Which windows a step is judged by: every eighth, (windows,), bool; ``first`` is the number of the first one."""
    return torch.arange(first, first + windows) % 8 == 1


def training_dtype(kept_in: str | None) -> str:
    """The dtype that steps round a state to while they train, of one that is to be kept in a dtype.

    It is int4 for int4. Wider ones lose too little to win back, so that float32 does.
    """
    return INT4.name if kept_in == INT4.name else FLOAT32.name


@dataclass(frozen=True)
class MixerStep:
    """A registered step of mixer scope.

    Attributes:
        name: in recipes, in lower case.
        summary: one line for the command line's help.
        recover: changes the parameters of a pruned mixer, and of its projection, in place; gets the block, the step's
            amount and a seed. What the dense mixer gave is in the block's ``dense_outputs``.
        default_amount: of a step that is written with a number, such as ``refit100``; None for one without.
        streamable: whether one block in memory at a time is enough.
        rounds: whether it rounds the state as the block's ``state_dtype`` asks.
        scope: always ``mixer``.
    """

    name: str
    summary: str
    recover: Callable[[PrunedBlock, int, int], None]
    default_amount: int | None = None
    streamable: bool = True
    rounds: bool = False
    scope: Literal["mixer"] = "mixer"


@dataclass(frozen=True)
class ModelStep:
    """A registered step of model scope.

    Attributes:
        name: in recipes, in lower case.
        summary: one line for the command line's help.
        recover: changes parameters of the pruned model in place; gets the pruned and the dense model, the calibration
            windows, the step's amount, a seed, the dtype that the state is to be kept in, or None, and a listener. What
            it gives, if it trains the whole model by gradients, goes into the plan.
        default_amount: of a step that is written with a number; None for one without.
        streamable: never: the whole model is in memory.
        rounds: always: it is told the dtype.
        scope: always ``model``.
    """

    name: str
    summary: str
    recover: Callable[[PreTrainedModel, PreTrainedModel, Windows, int, int, str | None, Progress], Distillation | None]
    default_amount: int | None = None
    streamable: Literal[False] = False
    rounds: Literal[True] = True
    scope: Literal["model"] = "model"


_STEPS: dict[str, MixerStep | ModelStep] = {}


def register_step(step: MixerStep | ModelStep) -> None:
    """Make a step known to recipes by its name; an earlier one of that name is replaced.

    Args:
        step: of mixer or of model scope.
    """
    if not re.fullmatch(r"[a-z][a-z-]*", step.name):
        raise InputError(f"A step can't be called {step.name!r}; expected lower-case letters and hyphens.")
    _STEPS[step.name] = step


def step_names() -> tuple[str, ...]:
    return tuple(sorted(_STEPS))


@dataclass(frozen=True)
class Step:
    """A recovery step as a recipe has it: ``repair``, or with its amount ``refit100``.

    Attributes:
        name: one of `step_names`.
        amount: such as the 100 of ``refit100``; the step's default if not given.

    Raises:
        InputError: no such step, an amount below 1, or one for a step that takes none.
    """

    name: str
    amount: int | None = None

    def __post_init__(self) -> None:
        if self.name not in _STEPS:
            raise unknown_name("recovery step", self.name, step_names())
        if self.registered.default_amount is None and self.amount is not None:
            raise InputError(f"{self.name} takes no number; found {self.amount}.")
        if self.amount is not None and self.amount < 1:
            raise InputError(f"The number of {self.name} is {self.amount}; expected 1 or more.")
        if self.amount is None:
            object.__setattr__(self, "amount", self.registered.default_amount)

    @classmethod
    def parse(cls, text: str) -> Step:
        """The step that a text spells, such as ``refit100``."""
        match = re.fullmatch(r"([a-z-]+)(\d*)", text)
        if match is None:
            raise unknown_name("recovery step", text, step_names())
        return cls(match[1], int(match[2]) if match[2] else None)

    def __str__(self) -> str:
        return self.name if self.amount is None else f"{self.name}{self.amount}"

    @property
    def registered(self) -> MixerStep | ModelStep:
        return _STEPS[self.name]
