"""What to do to a model, in one word: a method, and what follows its choice."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ghostssm.errors import InputError
from ghostssm.methods import Method, method_named

DEFAULT_REFIT_STEPS = 100


@dataclass(frozen=True)
class Recipe:
    """A method with its repairs, written as ``output``, ``ghost+repair``, ``output+refit100+repair`` or
    ``balanced+per-layer``.

    Attributes:
        method: a registered method's name.
        repair: fit D and out_proj of every pruned mixer in closed form (`ghostssm.recovery.repair`).
        refit: steps of gradient descent on every pruned mixer's small tensors (`ghostssm.recovery.refit`).
        per_layer: divide the total state over the layers by what it costs them.

    Raises:
        InputError: no such method, a negative number of steps, or sizes per layer for a method that cuts no state.
    """

    method: str
    repair: bool = False
    refit: int = 0
    per_layer: bool = False

    def __post_init__(self) -> None:
        method_named(self.method)
        if self.refit < 0:
            raise InputError(f"The number of refit steps is {self.refit}; expected 0 or more.")
        if self.per_layer and not self.how.shrinks:
            raise InputError(
                f"{self.method} leaves the state whole, so it can't divide it over the layers; leave +per-layer out."
            )

    @classmethod
    def parse(cls, text: str) -> Recipe:
        """The recipe that is written like this; raises InputError for an unknown part."""
        method, *parts = text.split("+")
        repair, refit, per_layer = False, 0, False
        for part in parts:
            steps = re.fullmatch(r"refit(\d*)", part)
            if steps:
                refit = int(steps[1] or DEFAULT_REFIT_STEPS)
            elif part == "repair":
                repair = True
            elif part == "per-layer":
                per_layer = True
            else:
                raise InputError(
                    f"{part!r} in {text!r} is unknown; expected METHOD, then any of +repair, +refit, +refitN "
                    "(N steps) and +per-layer."
                )
        return cls(method, repair, refit, per_layer)

    def __str__(self) -> str:
        parts = [self.method]
        if self.refit:
            parts.append(f"refit{self.refit}")
        if self.repair:
            parts.append("repair")
        if self.per_layer:
            parts.append("per-layer")
        return "+".join(parts)

    @property
    def how(self) -> Method:
        return method_named(self.method)

    @property
    def stock(self) -> bool:
        """Whether the result stays in the stock model class."""
        return self.how.stock and not self.per_layer


DEFAULT_RECIPE = Recipe("output", repair=True, refit=DEFAULT_REFIT_STEPS)
"""What loses least among the recipes whose results load in stock classes."""
