"""Which state size and dtype was taken for so many bytes, and what each choice lost."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ghostssm.plan.measurement import Difference, difference_as_json
from ghostssm.units import bytes_text, plus_minus


@dataclass(frozen=True)
class Candidate:
    """A state size and dtype.

    Attributes:
        state_size: on average over layers.
        state_dtype: by name.
        state_bytes: of one sequence, all layers, scales included.
        excess: over the dense model with a float32 state, nats per token, and its standard error (NaN for one window).
    """

    state_size: float
    state_dtype: str
    state_bytes: int
    excess: Difference


@dataclass(frozen=True)
class Choice:
    """What lost least within a bound on the bytes of one sequence's state.

    Attributes:
        state_bytes: the bound.
        windows: those held out of the calibration windows.
        candidates: the smallest loss first, which is what was chosen.
    """

    state_bytes: int
    windows: int
    candidates: tuple[Candidate, ...]

    @property
    def chosen(self) -> Candidate:
        return self.candidates[0]

    @property
    def text(self) -> str:
        """What was chosen, and what it was measured on."""
        chosen = self.chosen
        excess = plus_minus(chosen.excess.mean, chosen.excess.standard_error)
        return (
            f"N' = {chosen.state_size:g} in {chosen.state_dtype}, {excess} nats per token, on {self.windows} held-out "
            "calibration windows"
        )

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Headers and lines of a table of all candidates."""
        return ["N'", "state dtype", "state/seq", "excess loss"], [
            [
                f"{each.state_size:g}",
                each.state_dtype,
                bytes_text(each.state_bytes),
                plus_minus(each.excess.mean, each.excess.standard_error),
            ]
            for each in self.candidates
        ]

    @classmethod
    def from_json(cls, document: Any) -> Choice | None:
        """The value that `as_json` wrote; None for any other document, since anybody may have written the file."""
        try:
            candidates = tuple(
                Candidate(
                    float(each["state_size"]),
                    str(each["state_dtype"]),
                    int(each["state_bytes"]),
                    Difference(
                        math.inf if each["excess_loss"] is None else float(each["excess_loss"]),
                        math.nan if each["standard_error"] is None else float(each["standard_error"]),
                    ),
                )
                for each in document["candidates"]
            )
            return (
                cls(int(document["state_bytes"]), int(document["held_out_windows"]), candidates) if candidates else None
            )
        except (KeyError, TypeError, ValueError, OverflowError):
            return None

    def as_json(self) -> dict[str, Any]:
        """JSON values; None for an infinite loss, and for a standard error where there is none."""
        return {
            "state_bytes": self.state_bytes,
            "held_out_windows": self.windows,
            "candidates": [
                {
                    "state_size": each.state_size,
                    "state_dtype": each.state_dtype,
                    "state_bytes": each.state_bytes,
                    **difference_as_json(each.excess),
                }
                for each in self.candidates
            ],
        }
