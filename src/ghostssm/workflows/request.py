"""What the requests of several verbs have in common: options, their names for people, their JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from transformers import PreTrainedTokenizerBase

from ghostssm.errors import InputError
from ghostssm.pruning.run import DEFAULT_SEED
from ghostssm.text.sources import Text, read_text
from ghostssm.text.windows import Windows, cut_windows, evaluation_windows
from ghostssm.units import text_name

_OPTIONS = {
    "batches": "--batch",
    "engines": "--engine",
    "recipe": "--method",
    "state_dtypes": "--state-dtype",
    "state_sizes": "--state-size",
    "trained": "--train",
}
"""Names on the command line that are not those of the fields."""
_NOT_IN_RESULT = frozenset({"output", "stream", "overwrite", "offload", "resume", "push_to_hub", "private", "device"})
PLACES = frozenset({"model", "calibration", "evaluate", "text", "tokenizer"})
"""Options that name a model or a text; its fingerprint says more than where it lies."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What models are opened and losses are measured with.

    Attributes:
        window_length: tokens per window.
        text_windows: windows to measure the loss on; all of the text if not given.
        tokenizer: folder or hub id of the tokenizer, if the model has none.
        device: where to compute, such as ``cpu`` or ``cuda``.
    """

    window_length: int = 2048
    text_windows: int | None = None
    tokenizer: str | None = None
    device: str = "cpu"

    def as_json(self) -> dict[str, Any]:
        """What decides the result, as JSON values: names of texts and models, not where they lay on a disk."""
        return {each.name: self._json(each.name) for each in fields(self) if each.name not in _NOT_IN_RESULT}

    def _json(self, name: str) -> Any:
        value = getattr(self, name)
        if name in PLACES and value is not None:
            return text_name(value)
        return list(value) if isinstance(value, tuple) else value

    def differs(self, name: str) -> bool:
        """Whether an option is given, with another value than its default."""
        return any(each.name == name and getattr(self, name) != each.default for each in fields(self))

    def windows_of(self, text: str | Text, vocabulary: PreTrainedTokenizerBase) -> Windows:
        """The windows of a text to measure the loss on."""
        text = read_text(text, "evaluation") if isinstance(text, str) else text
        return evaluation_windows(text, vocabulary, self.window_length, self.text_windows)


@dataclass(frozen=True, kw_only=True)
class CalibratingRequest(Request):
    """What methods see besides.

    Attributes:
        calibration: text to calibrate on.
        windows: how many windows of it are drawn.
        seed: of this draw, and of everything else that is random.
    """

    calibration: str = "wikitext2"
    windows: int = 128
    seed: int = DEFAULT_SEED

    def calibration_windows(self, vocabulary: PreTrainedTokenizerBase, text: Text | None = None) -> Windows:
        """The windows to calibrate on, of the text if it is read already."""
        text = text or read_text(self.calibration, "calibration")
        return cut_windows(text, vocabulary, self.window_length, self.windows, self.seed)


def option(name: str) -> str:
    """A field's option on the command line."""
    return _OPTIONS.get(name, "--" + name.replace("_", "-"))


def check_belonging(request: Request, owners: Mapping[str, tuple[str, ...]]) -> None:
    """Raise InputError for an option that is given without any of those that it is about."""
    for name, others in owners.items():
        if request.differs(name) and not any(getattr(request, other) for other in others):
            needed = " or ".join(map(option, others))
            raise InputError(f"{option(name)} works with {needed} only; add that, or leave out {option(name)}.")


def check_heeded(request: Request, owner: str, *names: str) -> None:
    """Raise InputError for an option that is given beside one that takes its effect away."""
    for name in names:
        if getattr(request, owner) and request.differs(name):
            mine, other = option(name), option(owner)
            raise InputError(f"{mine} has no effect with {other}; leave out that, or leave out {mine}.")
