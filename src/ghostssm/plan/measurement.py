"""What a pruned model loses: measured once on a text, or in a search; written into its manifest and model card."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ghostssm.units import bytes_text, counted, plus_minus

MALFORMED = (KeyError, TypeError, ValueError, OverflowError)
"""What reading a value from a JSON document raises if something else is written there."""


@dataclass(frozen=True)
class Difference:
    """A mean difference over paired windows.

    Attributes:
        mean: over the windows, nats per token.
        standard_error: of the mean; NaN for one window.
    """

    mean: float
    standard_error: float

    @property
    def text(self) -> str:
        """The mean and, where there is one, its standard error."""
        return plus_minus(self.mean, self.standard_error)

    def as_json(self) -> dict[str, float | None]:
        """JSON values; what is not finite is None."""
        numbers = {"excess_loss": self.mean, "standard_error": self.standard_error}
        return {name: value if math.isfinite(value) else None for name, value in numbers.items()}

    @classmethod
    def from_json(cls, document: Any) -> Difference:
        """From the entries that `as_json` wrote; a mean of None is an infinite one. Raises `MALFORMED` for others."""
        mean, error = document["excess_loss"], document["standard_error"]
        return cls(math.inf if mean is None else float(mean), math.nan if error is None else float(error))


@dataclass(frozen=True)
class Compared:
    """What a recipe leaves of the state, and what that loses on the windows of a measurement.

    Attributes:
        recipe: by name.
        own_class: whether its result needs a model class of our own.
        state_size: on average over layers.
        state_dtype: by name.
        state_bytes: of one sequence, all layers, scales included.
        excess: over the dense model, nats per token, with the standard error of the paired difference; infinite where
            the model overflows.
    """

    recipe: str
    own_class: bool
    state_size: float
    state_dtype: str
    state_bytes: int
    excess: Difference

    @classmethod
    def from_json(cls, document: Any) -> Compared:
        """From what `as_json` wrote; raises `MALFORMED` for anything else."""
        size, dtype, taken = float(document["state_size"]), str(document["state_dtype"]), int(document["state_bytes"])
        own_class, excess = document["own_class"] is True, Difference.from_json(document)
        return cls(str(document["recipe"]), own_class, size, dtype, taken, excess)

    def as_json(self) -> dict[str, Any]:
        """JSON values; None for an infinite loss, and for a standard error where there is none."""
        values = {name: value for name, value in vars(self).items() if name != "excess"}
        return values | self.excess.as_json()


@dataclass(frozen=True)
class Measurement:
    """Losses of a dense and a pruned model on the same windows, in nats per token.

    Attributes:
        text: what the windows were cut from.
        windows: their number.
        window_length: tokens in each.
        dense_loss: mean over the windows.
        pruned_loss: mean over the windows.
        excess: the mean difference, and its standard error from the paired windows (NaN for one window).
        compared: the pruned model, and the baselines beside it; empty where no baseline was asked for.
    """

    text: str
    windows: int
    window_length: int
    dense_loss: float
    pruned_loss: float
    excess: Difference
    compared: tuple[Compared, ...] = ()

    @classmethod
    def from_json(cls, document: Any) -> Measurement | None:
        """The value that `as_json` wrote; None for any other document, since anybody may have written the file."""
        try:
            return cls(
                str(document["text"]),
                int(document["windows"]),
                int(document["window_length"]),
                float(document["dense_loss"]),
                float(document["pruned_loss"]),
                Difference.from_json(document),
                tuple(map(Compared.from_json, document.get("compared", ()))),
            )
        except MALFORMED:
            return None

    @property
    def excess_text(self) -> str:
        """The excess and, where there is one, its standard error."""
        return self.excess.text

    def as_json(self) -> dict[str, Any]:
        """JSON values; the standard error is None where there is none, and ``compared`` left out where it is empty."""
        values = {name: value for name, value in vars(self).items() if name not in ("excess", "compared")}
        compared = {"compared": [each.as_json() for each in self.compared]} if self.compared else {}
        return values | self.excess.as_json() | compared

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Headers and lines of a table of the pruned model and the baselines, the smallest loss first."""
        headers = ["method", "checkpoint", "N'", "state dtype", "state/seq", "excess loss"]
        return headers, [
            [
                each.recipe,
                "own class" if each.own_class else "stock",
                f"{each.state_size:g}",
                each.state_dtype,
                bytes_text(each.state_bytes),
                each.excess.text,
            ]
            for each in sorted(self.compared, key=lambda each: each.excess.mean)
        ]


@dataclass(frozen=True)
class Searched:
    """The excess loss of the state that the search for the smallest one within a bound chose.

    Attributes:
        max_excess_loss: the bound, nats per token. windows: those held out of the calibration windows.
        state_dtype: that the state was kept in.
        excess: the mean difference on them, and its standard error (NaN for one window).
    """

    max_excess_loss: float
    windows: int
    state_dtype: str
    excess: Difference

    @classmethod
    def from_json(cls, document: Any) -> Searched | None:
        """The value that `as_json` wrote; None for any other document, since anybody may have written the file."""
        try:
            bound, windows = float(document["max_excess_loss"]), int(document["held_out_windows"])
            return cls(bound, windows, str(document["state_dtype"]), Difference.from_json(document))
        except MALFORMED:
            return None

    @property
    def text(self) -> str:
        """The excess with its standard error, and what it was measured on."""
        kept = f"with the state in {self.state_dtype}"
        return f"{self.excess.text} nats per token {kept}, on {counted(self.windows, 'held-out calibration window')}"

    def as_json(self) -> dict[str, Any]:
        """JSON values; the standard error is None where there is none."""
        bound = {"max_excess_loss": self.max_excess_loss, "held_out_windows": self.windows}
        return bound | {"state_dtype": self.state_dtype} | self.excess.as_json()
