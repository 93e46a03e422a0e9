"""What can go wrong, one class per kind of fault.

A message names the file or option, what was found, what was expected, and the next step.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

CONVERT = "ghostssm export MODEL --format transformers --dtype bf16 --output DIR"
"""How a model comes to have a dtype with a wider range than float16."""


class GhostError(Exception):
    """Base of every error that ghostssm raises on purpose.

    Attributes:
        told: another process of the run has raised it too and prints it, so this one stays silent.
    """

    told = False


class GhostWarning(UserWarning):
    """Something that is not as it should be, but keeps nothing from being done."""


class InputError(GhostError):
    """Something the user gave is not usable; the command line exits with 2."""


class LayoutError(InputError):
    """Sizes that no Mamba-2 mixer can have."""


class ModelError(InputError):
    """A checkpoint that is missing, broken, contradictory, or not a Mamba-2 model."""


class TextError(InputError):
    """Text that is missing, unreadable, binary, empty or too short."""


class PlanError(InputError):
    """A plan that is malformed or belongs to another model."""


class OutputError(InputError):
    """An output folder that must not be written."""


class StorageError(GhostError):
    """Writing failed: a full disk, a quota, a disk that is gone. Nothing half-written is left."""


class IncompleteError(GhostError):
    """A checkpoint was written with whole weights, but without something that belongs beside them.

    Attributes:
        folder: where it is.
    """

    def __init__(self, message: str, folder: Path):
        super().__init__(message)
        self.folder = folder

    def __reduce__(self) -> tuple[type[IncompleteError], tuple[str, Path]]:
        """For the processes that share a run, which tell each other."""
        return type(self), (str(self), self.folder)


class ProcessError(GhostError):
    """Another process of a run that several share is gone."""


class NumericalError(InputError):
    """NaN or Inf in a model's weights or activations; names the tensor or the layer."""


class HubError(GhostError):
    """An upload that failed; what was to be uploaded is on the disk."""


class PrecisionWarning(GhostWarning):
    """A model that was written overflows in the dtype of its weights, and not in float32; names the layer."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the name of its class where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def unknown_name(what: str, name: str, known: Iterable[str]) -> InputError:
    """What to raise for a name that is not among those known; it asks for the nearest one.

    Args:
        what: a name's kind, such as "method".
    """
    names = list(known)
    return InputError(f"No {what} is called {name!r}; expected one of: {', '.join(names)}.{did_you_mean(name, names)}")


def did_you_mean(name: str, known: Iterable[str], most: int = 1) -> str:
    """The nearest of the names, as a question to put behind a sentence; empty where none is near."""
    names = list(known)
    near = [other for other in names if name and other.startswith(name)] or get_close_matches(name, names, most)
    return f" Did you mean {' or '.join(map(repr, near[:most]))}?" if near else ""
