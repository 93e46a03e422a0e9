"""A recipe: a method, and the recovery steps that follow its decisions."""

from __future__ import annotations

from dataclasses import dataclass

from ghostssm.errors import InputError
from ghostssm.methods import Method, method_named, method_names
from ghostssm.recovery import Step, step_names
from ghostssm.recovery.base import training_dtype

_PER_LAYER = "per-layer"
_STEP_COST, _COST_PER_AMOUNT = 0.5, 0.05
"""The cost of a recovery step without a number; and for each of its number, of a step with one."""


@dataclass(frozen=True)
class Recipe:
    """A method with recovery steps, written as ``output``, ``ghost+repair``, ``output+refit100+repair`` or
    ``balanced+per-layer``.

    Attributes:
        method: a registered method's name.
        steps: in the order in which they are carried out: those that mend mixers before those that train the model.
        per_layer: divide the total state over the layers by what it costs them.

    Raises:
        InputError: no such method or step, or sizes per layer for a method that cuts no state.
    """

    method: str
    steps: tuple[Step, ...] = ()
    per_layer: bool = False

    def __post_init__(self) -> None:
        method_named(self.method)
        by_scope = sorted(self.steps, key=lambda step: step.registered.scope == "model")  # the walk ends before those
        object.__setattr__(self, "steps", tuple(by_scope))
        if self.per_layer and not self.registered.shrinks:
            raise InputError(
                f"{self.method} leaves the state whole, so it can't divide it over the layers; leave +per-layer out."
            )

    @classmethod
    def parse(cls, text: str) -> Recipe:
        """The recipe that a text spells; raises InputError for an unknown part."""
        method, *parts = text.split("+")
        try:
            steps = tuple(Step.parse(part) for part in parts if part != _PER_LAYER)
        except InputError as error:
            raise InputError(
                f"The recipe {text!r} can't be read: {error} A recipe is METHOD, then any of "
                f"{', '.join(f'+{name}' for name in (*step_names(), _PER_LAYER))}; some take a number, as +refit100."
            ) from None
        return cls(method, steps, _PER_LAYER in parts)

    def __str__(self) -> str:
        return "+".join([self.method, *map(str, self.steps), *[_PER_LAYER] * self.per_layer])

    @property
    def registered(self) -> Method:
        return method_named(self.method)

    def check_streamable(self) -> None:
        """Raise InputError unless it can be carried out with one block in memory at a time."""
        unable = [step for step in self.steps if not step.registered.streamable]
        if not self.registered.streamable:
            fault = f"{self.method} needs the whole model at once"
        elif unable:
            fault = f"{unable[0]} changes the whole model at once"
        else:
            return
        able = [name for name in method_names() if method_named(name).streamable]
        raise InputError(
            f"{fault}, so it can't be streamed. Leave out --stream, or take one of {', '.join(able)}, without a step "
            "that trains the whole model."
        )

    def trained_in(self, state_dtype: str) -> str | None:
        """The dtype that steps round a state to that is to be kept in one; None if they take it as it is computed."""
        return training_dtype(state_dtype) if any(step.registered.rounds for step in self.steps) else None

    @property
    def cost(self) -> float:
        """About how long it takes on the same windows; GHOST is the unit. For estimates of the time left."""
        cost = 0.2 if self.registered.one_shot else 1.0 if self.registered.decide is None else 3.0
        cost += sum(_STEP_COST if step.amount is None else step.amount * _COST_PER_AMOUNT for step in self.steps)
        return cost * (2.0 if self.per_layer else 1.0)

    @property
    def stock(self) -> bool:
        """Whether the result stays in the stock model class."""
        return self.registered.stock and not self.per_layer
