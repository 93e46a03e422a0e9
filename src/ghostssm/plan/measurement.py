"""What a pruned model loses: measured once on a text, or in a search; written into its manifest and model card."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ghostssm.units import plus_minus


@dataclass(frozen=True)
class Difference:
    """A mean difference over paired windows.

    Attributes:
        mean: over the windows, nats per token.
        standard_error: of the mean; NaN for one window.
    """

    mean: float
    standard_error: float


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
    """

    text: str
    windows: int
    window_length: int
    dense_loss: float
    pruned_loss: float
    excess: Difference

    @classmethod
    def from_json(cls, document: Any) -> Measurement | None:
        """The value that `as_json` wrote; None for any other document, since anybody may have written the file."""
        try:
            losses = [float(document[key]) for key in ("dense_loss", "pruned_loss", "excess_loss")]
            error = document["standard_error"]
            dense, pruned, excess = losses
            difference = Difference(excess, math.nan if error is None else float(error))
            return cls(
                str(document["text"]),
                int(document["windows"]),
                int(document["window_length"]),
                dense,
                pruned,
                difference,
            )
        except (TypeError, ValueError, KeyError, OverflowError):
            return None

    @property
    def excess_text(self) -> str:
        """The excess and, where there is one, its standard error."""
        return plus_minus(self.excess.mean, self.excess.standard_error)

    def as_json(self) -> dict[str, Any]:
        """JSON values; the standard error is None where there is none."""
        return {
            "text": self.text,
            "windows": self.windows,
            "window_length": self.window_length,
            "dense_loss": self.dense_loss,
            "pruned_loss": self.pruned_loss,
            **_as_json(self.excess),
        }


@dataclass(frozen=True)
class Searched:
    """The excess loss of the state that the search for the smallest one within a bound chose.

    Attributes:
        max_excess_loss: the bound, nats per token. windows: those held out of the calibration windows.
        excess: the mean difference on them, and its standard error (NaN for one window).
    """

    max_excess_loss: float
    windows: int
    excess: Difference

    @classmethod
    def from_json(cls, document: Any) -> Searched | None:
        """The value that `as_json` wrote; None for any other document, since anybody may have written the file."""
        try:
            error = math.nan if document["standard_error"] is None else float(document["standard_error"])
            excess = Difference(float(document["excess_loss"]), error)
            return cls(float(document["max_excess_loss"]), int(document["held_out_windows"]), excess)
        except (KeyError, TypeError, ValueError):
            return None

    @property
    def text(self) -> str:
        """The excess with its standard error, and what it was measured on."""
        excess = plus_minus(self.excess.mean, self.excess.standard_error)
        return f"{excess} nats per token, on {self.windows} held-out calibration windows"

    def as_json(self) -> dict[str, Any]:
        """JSON values; the standard error is None where there is none."""
        return {
            "max_excess_loss": self.max_excess_loss,
            "held_out_windows": self.windows,
            **_as_json(self.excess),
        }


def _as_json(excess: Difference) -> dict[str, float | None]:
    error = excess.standard_error
    return {"excess_loss": excess.mean, "standard_error": None if math.isnan(error) else error}
