"""What a plan was made from and with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ghostssm.ops.state_format import FORMATS, TIERS
from ghostssm.plan.choice import Choice
from ghostssm.plan.measurement import Searched
from ghostssm.values import Value

_IF_GIVEN = ("search", "choice", "asked_state_dtype")
_PROVENANCE = {"requested_state_size": int, "groups": str, "seed": int, "multiple": int, "calibration": dict}
_CALIBRATION = {"text": str, "text_sha256": str, "tokens_sha256": str, "windows": int, "window_length": int}


@dataclass(frozen=True, repr=False)
class CalibrationText(Value):
    """The windows that a plan was calibrated on.

    Attributes:
        text: its name.
        text_sha256: of its characters.
        tokens_sha256: of the windows' token ids.
        windows: their number.
        window_length: tokens in each.
        seed: of the draw; None where the windows follow one another.
    """

    text: str
    text_sha256: str
    tokens_sha256: str
    windows: int
    window_length: int
    seed: int | None


@dataclass(frozen=True, repr=False)
class Provenance(Value):
    """What a plan was made from and with.

    Attributes:
        requested_state_size: N' as asked for, on average over layers and groups.
        groups: how the groups of a layer share it.
        seed: of what was drawn at random.
        multiple: of state sizes per layer.
        calibration: the windows.
        search: what a search for the smallest state measured, if there was one.
        choice: what was measured to choose size and dtype for a number of bytes, if they were chosen so.
        asked_state_dtype: that the state is to be kept in, if one was asked for.
    """

    requested_state_size: int
    groups: str
    seed: int
    multiple: int
    calibration: CalibrationText
    search: Searched | None = None
    choice: Choice | None = None
    asked_state_dtype: str | None = None

    @property
    def state_dtype(self) -> str | None:
        """The dtype that the state is to be kept in, chosen or asked for; None if neither."""
        decided = self.search if self.choice is None else self.choice.chosen
        return self.asked_state_dtype if decided is None else decided.state_dtype

    def as_json(self) -> dict[str, Any]:
        """JSON values; what was not measured or asked for is left out."""
        measured = {name: part.as_json() for name in ("search", "choice") if (part := getattr(self, name))}
        values = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in _IF_GIVEN}
        asked = {} if self.asked_state_dtype is None else {"asked_state_dtype": self.asked_state_dtype}
        return values | {"calibration": asdict(self.calibration)} | measured | asked

    @classmethod
    def from_json(cls, document: Any) -> Provenance | None:
        """The value that `as_json` wrote; None for any other document, since anybody may have written the file."""
        if not _has(document, _PROVENANCE) or not _has(text := document["calibration"], _CALIBRATION):
            return None
        if type(text.get("seed")) not in (int, type(None)):
            return None
        dtype = document.get("asked_state_dtype")
        return cls(
            **{name: document[name] for name in ("requested_state_size", "groups", "seed", "multiple")},
            calibration=CalibrationText(**{each.name: text.get(each.name) for each in fields(CalibrationText)}),
            search=Searched.from_json(document.get("search")),
            choice=Choice.from_json(document.get("choice")),
            asked_state_dtype=dtype if dtype in (*FORMATS, TIERS.name) else None,
        )


def _has(document: Any, kinds: Mapping[str, type]) -> bool:
    """Whether a JSON value is an object with entries of these types; a truth value is no number."""
    return isinstance(document, dict) and all(type(document.get(name)) is kind for name, kind in kinds.items())
