"""The state size and dtype that were chosen for so many bytes, and what every candidate lost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ghostssm.plan.measurement import MALFORMED, Difference
from ghostssm.units import bytes_text, counted


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

    def as_json(self) -> dict[str, Any]:
        """JSON values; None for an infinite loss, and for a standard error where there is none."""
        values = {name: value for name, value in vars(self).items() if name != "excess"}
        return values | self.excess.as_json()

    @classmethod
    def from_json(cls, document: Any) -> Candidate:
        """From what `as_json` wrote; raises `MALFORMED` for anything else."""
        size, dtype = float(document["state_size"]), str(document["state_dtype"])
        return cls(size, dtype, int(document["state_bytes"]), Difference.from_json(document))


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
        return (
            f"N' = {chosen.state_size:g} in {chosen.state_dtype}, {chosen.excess.text} nats per token, on "
            f"{counted(self.windows, 'held-out calibration window')}"
        )

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Headers and lines of a table of all candidates."""
        return ["N'", "state dtype", "state/seq", "excess loss"], [
            [f"{each.state_size:g}", each.state_dtype, bytes_text(each.state_bytes), each.excess.text]
            for each in self.candidates
        ]

    @classmethod
    def from_json(cls, document: Any) -> Choice | None:
        """The value that `as_json` wrote; None for any other document, since anybody may have written the file."""
        try:
            candidates = tuple(map(Candidate.from_json, document["candidates"]))
            bound, windows = int(document["state_bytes"]), int(document["held_out_windows"])
            return cls(bound, windows, candidates) if candidates else None
        except MALFORMED:
            return None

    def as_json(self) -> dict[str, Any]:
        """JSON values."""
        candidates = [each.as_json() for each in self.candidates]
        return {"state_bytes": self.state_bytes, "held_out_windows": self.windows, "candidates": candidates}
