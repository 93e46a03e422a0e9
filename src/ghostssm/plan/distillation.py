"""What a distillation did: which text, how much of it, and how the loss went; part of a plan and of a manifest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ghostssm.choices import Trained
from ghostssm.ops.state_format import FLOAT32, FORMATS
from ghostssm.plan.measurement import MALFORMED, Difference, Measurement

MOVED = {"mixers": "the mixers", "small": "all but the large matrices", "all": "all parameters"}
"""`Trained` in words."""


@dataclass(frozen=True)
class Point:
    """What was measured on the held-out windows at one step.

    Attributes:
        step: of the student, 0 before the first. tokens: trained on so far.
        divergence: KL of the teacher's next-token distribution to the student's, nats per token.
        excess: of the student's loss over the teacher's, paired by windows.
    """

    step: int
    tokens: int
    divergence: float
    excess: Difference

    @property
    def excess_text(self) -> str:
        return self.excess.text

    def as_json(self) -> dict[str, Any]:
        """JSON values; None for what is not finite."""
        divergence = self.divergence if math.isfinite(self.divergence) else None
        return {"step": self.step, "tokens": self.tokens, "divergence": divergence} | self.excess.as_json()

    @classmethod
    def from_json(cls, document: Any) -> Point:
        """From what `as_json` wrote, where None is infinite; raises `MALFORMED` for anything else."""
        divergence = math.inf if document["divergence"] is None else float(document["divergence"])
        return cls(int(document["step"]), int(document["tokens"]), divergence, Difference.from_json(document))


@dataclass(frozen=True)
class Distillation:
    """A training of the whole pruned model on its teacher's next-token distributions.

    Attributes:
        teacher: its published name; None for the dense model that the recipe began with.
        text: what it was trained on.
        text_sha256: of the text, if it was held as a whole.
        tokens_sha256: of the batches in their order.
        steps: taken.
        tokens: trained on, in all steps.
        kept_step: whose parameters were kept.
        seed: as it was asked for.
        learning_rate: the largest one, before any setback.
        trained: which parameters moved.
        held_out_windows: set apart from the text.
        curve: on these windows, from before the first step on.
        ended: why there were no more steps.
        overlap: of the pieces of 32 tokens of these other texts, the share that was trained on; None if there are none.
        before: losses on other texts, of the student as it came.
        after: the same, of the student as it went.
        state_dtype: that the student's state was rounded to after every token.
        hidden_weight: of the hidden states' errors, beside the divergence.
        setbacks: why the training went back to its best parameters, each time, to go on at a lower learning rate.
    """

    teacher: str | None
    text: str
    text_sha256: str | None
    tokens_sha256: str
    steps: int
    tokens: int
    kept_step: int
    seed: int
    learning_rate: float
    trained: Trained
    held_out_windows: int
    curve: Sequence[Point]
    ended: str
    overlap: float | None = None
    before: Sequence[Measurement] = field(default=())
    after: Sequence[Measurement] = field(default=())
    state_dtype: str = FLOAT32.name
    hidden_weight: float = 0.0
    setbacks: Sequence[str] = field(default=())

    @property
    def best(self) -> Point:
        """The point whose parameters were kept."""
        return next(point for point in self.curve if point.step == self.kept_step)

    @property
    def rounded_text(self) -> str:
        """What to add to a sentence on how the student was trained; empty if its state was not rounded."""
        rounded = self.state_dtype != FLOAT32.name
        return f", with the state rounded to {self.state_dtype} after every token" if rounded else ""

    def as_json(self) -> dict[str, Any]:
        """JSON values."""
        measured = {name: [each.as_json() for each in getattr(self, name)] for name in ("before", "after")}
        return asdict(self) | {"curve": [point.as_json() for point in self.curve]} | measured

    @classmethod
    def from_json(cls, document: Any) -> Distillation | None:
        """The value that `as_json` wrote; None for any other document, since anybody may have written the file."""
        try:
            # Files that were written before these were recorded do not have them.
            document = {"state_dtype": FLOAT32.name, "hidden_weight": 0.0, "setbacks": ()} | document
            values = {name: document[name] for name in cls.__dataclass_fields__}
            curve = tuple(map(Point.from_json, values["curve"]))
            measured = {
                name: tuple(each for entry in values[name] if (each := Measurement.from_json(entry)) is not None)
                for name in ("before", "after")
            }
            setbacks = tuple(str(reason) for reason in values["setbacks"])
            weight = float(values["hidden_weight"])
            read = cls(**values | {"curve": curve, "hidden_weight": weight, "setbacks": setbacks} | measured)
            kept = any(point.step == read.kept_step for point in curve)
            return read if kept and type(read.tokens) is int and read.state_dtype in FORMATS else None
        except MALFORMED:
            return None


def state_dtype_of(distillations: Sequence[Distillation]) -> str | None:
    """The dtype that the last training with a rounded state was for; None if there was none."""
    return next((each.state_dtype for each in reversed(distillations) if each.state_dtype != FLOAT32.name), None)


def distillations_from_json(document: Any) -> tuple[Distillation, ...]:
    """The distillations in a list; what is none is left out."""
    read = map(Distillation.from_json, document if isinstance(document, list) else ())
    return tuple(each for each in read if each is not None)
