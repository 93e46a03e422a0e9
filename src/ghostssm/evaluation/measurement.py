"""What a pruned model loses: measured once on a text, or in a search; written into its manifest and model card."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from ghostssm.data.windows import Windows
from ghostssm.evaluation.perplexity import Difference, Evaluation, evaluate
from ghostssm.progress import Progress, silent
from ghostssm.units import plus_minus, text_name


@dataclass(frozen=True)
class Measurement:
    """Losses of a dense and a pruned model on the same windows, in nats per token.

    Attributes:
        text: name of what the windows were cut from. windows: their number. window_length: tokens in each.
        dense_loss, pruned_loss: means over the windows.
        excess: the mean difference, and its standard error from the paired windows (NaN for one window).
    """

    text: str
    windows: int
    window_length: int
    dense_loss: float
    pruned_loss: float
    excess: Difference

    @classmethod
    def of(cls, windows: Windows, dense: Evaluation, pruned: Evaluation) -> Measurement:
        """Of two evaluations on these windows."""
        text = text_name(windows.text_name)
        return cls(text, len(windows), windows.length, dense.loss, pruned.loss, pruned.excess_over(dense))

    @classmethod
    def from_json(cls, found: Any) -> Measurement | None:
        """What `as_json` gave; None for anything else, since what a file holds may be anybody's."""
        try:
            losses = [float(found[key]) for key in ("dense_loss", "pruned_loss", "excess_loss")]
            error = found["standard_error"]
            dense, pruned, excess = losses
            difference = Difference(excess, math.nan if error is None else float(error))
            return cls(
                str(found["text"]), int(found["windows"]), int(found["window_length"]), dense, pruned, difference
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
    """What the search for the smallest state within a bound on the loss measured of the state that it found.

    Attributes:
        max_excess_loss: the bound, nats per token. windows: those held out of the calibration windows.
        excess: the mean difference on them, and its standard error (NaN for one window).
    """

    max_excess_loss: float
    windows: int
    excess: Difference

    @classmethod
    def of(cls, provenance: Mapping[str, Any]) -> Searched | None:
        """What a plan's provenance, which may be anybody's, says of it; None where nothing was searched."""
        try:
            found = provenance["search"]
            error = math.nan if found["standard_error"] is None else float(found["standard_error"])
            excess = Difference(float(found["excess_loss"]), error)
            return cls(float(found["max_excess_loss"]), int(found["held_out_windows"]), excess)
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


def evaluate_in_float32(model: PreTrainedModel, windows: Windows, progress: Progress = silent) -> Evaluation:
    """The model's loss in float32; a model in half precision is copied for it, and stays as it is.

    Raises:
        NumericalError: a loss that is not finite.
    """
    whole = model if model.dtype.itemsize >= 4 else copy.deepcopy(model).float()
    return evaluate(whole, windows, progress)
