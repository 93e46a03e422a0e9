"""What a report shows besides the plan: ``report.json`` in a checkpoint's folder.

Numbers are rounded to six digits: they are for looking at, not for computing with.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ghostssm.checkpoint.manifest import RECORD_FILE
from ghostssm.errors import InputError
from ghostssm.evaluation.perplexity import Evaluation
from ghostssm.files.outputs import OutputFile, storing
from ghostssm.ops.state_format import FLOAT32, StateFormat
from ghostssm.text.windows import Windows
from ghostssm.units import text_name

_FORMAT, _VERSION = "ghostssm-report", 1


@dataclass(frozen=True)
class Observations:
    """What the unpruned model does with its state: (g, n), float64, for each mixer, front to back.

    Attributes:
        weight_norms: norm of a channel's B row times norm of its C row.
        energies: root mean squared change of y from zeroing the channel (the score of ``ghost``).
        hankel: empirical Hankel singular values, descending in every group (those of ``balanced``).
        text, tokens: what they were measured on.
    """

    weight_norms: Mapping[str, Tensor]
    energies: Mapping[str, Tensor]
    hankel: Mapping[str, Tensor]
    text: str
    tokens: int


@dataclass(frozen=True)
class WindowLosses:
    """Losses on the same windows, nats per token, of the dense model and of others by their names."""

    text: str
    window_length: int
    dense: Sequence[float]
    pruned: Mapping[str, Sequence[float]]

    @classmethod
    def of(cls, windows: Windows, dense: Evaluation, pruned: Mapping[str, Evaluation]) -> WindowLosses:
        """The losses of evaluations on these windows."""
        losses = {name: tuple(evaluation.losses.tolist()) for name, evaluation in pruned.items()}
        return cls(text_name(windows.text_name), windows.length, tuple(dense.losses.tolist()), losses)


@dataclass(frozen=True)
class DecodeSpeed:
    """Decode speed of one model at one batch size, all sequences together, measured and predicted.

    Attributes:
        spread: of the measured speed, the slowest and the fastest round; None where it is not known.
    """

    model: str
    batch: int
    tokens_per_second: float
    predicted_tokens_per_second: float | None
    spread: tuple[float, float] | None = None


@dataclass(frozen=True)
class Samples:
    """How models go on from a prompt, each taking the likeliest token; ``text`` is where the prompt is from."""

    text: str
    prompt: str
    continuations: Mapping[str, str]


@dataclass(frozen=True)
class Record:
    """What was measured while a checkpoint was made; what was not measured is None or empty.

    Attributes:
        state_dtype: in which the pruned model's state was kept.
    """

    observations: Observations | None = None
    losses: WindowLosses | None = None
    decode: tuple[DecodeSpeed, ...] = ()
    samples: Samples | None = None
    state_dtype: str = FLOAT32.name

    def kept_in(self, state_dtype: str) -> Record:
        """The record of a pruned model whose state is kept in a dtype: what was measured in another one is left out."""
        return self if state_dtype == self.state_dtype else Record(self.observations, state_dtype=state_dtype)

    def write(self, folder: Path) -> None:
        """Write ``report.json`` into a folder; an old one is replaced. Of an empty record nothing is written.

        Raises:
            OutputError: the folder can't be written.
            StorageError: writing failed, for example on a full disk.
        """
        if self == Record():
            return
        measured = {name: part for name, part in vars(self).items() if part is not None}
        document = as_json({"format": _FORMAT, "version": _VERSION, **measured}, digits=6)
        with OutputFile(folder / RECORD_FILE, overwrite=True) as file, storing(file.path):
            file.partial.write_text(json.dumps(document) + "\n", encoding="utf-8")
            file.commit()

    @classmethod
    def read(cls, folder: Path, mixers: Sequence[str], channels: tuple[int, int]) -> Record:
        """The record of a folder; an empty one if there is none.

        Args:
            mixers: names of the plan's mixers, which the observations must have. channels: (g, n) of each.

        Raises:
            InputError: the file is broken, or of another plan.
        """
        path = folder / RECORD_FILE
        if not path.exists():
            return cls()
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            if (document["format"], document["version"]) != (_FORMAT, _VERSION):
                raise ValueError(f"its format is {document['format']!r}, version {document['version']!r}")
            seen, losses, samples = (document.get(part) for part in ("observations", "losses", "samples"))
            return cls(
                None if seen is None else _observations(seen, mixers, channels),
                None if losses is None else _losses(losses),
                tuple(_speed(entry) for entry in document.get("decode", [])),
                None if samples is None else _samples(samples),
                StateFormat.of(document.get("state_dtype", FLOAT32.name)).name,
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, InputError) as error:
            raise InputError(
                f"{path} is not a record that ghostssm wrote for this checkpoint ({error}); remove it, or prune "
                "again with --report."
            ) from None


def _observations(entry: dict[str, Any], mixers: Sequence[str], channels: tuple[int, int]) -> Observations:
    def tensors(field: str) -> dict[str, Tensor]:
        values = {str(name): torch.tensor(value, dtype=torch.float64) for name, value in entry[field].items()}
        if list(values) != list(mixers) or any(tuple(value.shape) != channels for value in values.values()):
            raise ValueError(f"its {field} are of other mixers")
        return values

    norms, energies, hankel = map(tensors, ("weight_norms", "energies", "hankel"))
    return Observations(norms, energies, hankel, str(entry["text"]), int(entry["tokens"]))


def _losses(entry: dict[str, Any]) -> WindowLosses:
    dense = [float(loss) for loss in entry["dense"]]
    pruned = {str(name): [float(loss) for loss in losses] for name, losses in entry["pruned"].items()}
    if not dense or not pruned or any(len(losses) != len(dense) for losses in pruned.values()):
        raise ValueError("its losses are of different windows, or of none")
    return WindowLosses(str(entry["text"]), int(entry["window_length"]), dense, pruned)


def _speed(entry: dict[str, Any]) -> DecodeSpeed:
    predicted, spread = entry["predicted_tokens_per_second"], entry.get("spread")
    return DecodeSpeed(
        str(entry["model"]),
        int(entry["batch"]),
        float(entry["tokens_per_second"]),
        None if predicted is None else float(predicted),
        None if spread is None else (float(spread[0]), float(spread[1])),
    )


def _samples(entry: dict[str, Any]) -> Samples:
    texts = {str(name): str(text) for name, text in entry["continuations"].items()}
    return Samples(str(entry["text"]), str(entry["prompt"]), texts)


def as_json(value: Any, digits: int) -> Any:
    """JSON values, with floats rounded to so many digits; a float that is not finite becomes None."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    if isinstance(value, Tensor):
        return as_json(value.tolist(), digits)
    if is_dataclass(value):
        return as_json(vars(value), digits)
    if isinstance(value, Mapping):
        return {key: as_json(entry, digits) for key, entry in value.items()}
    return [as_json(entry, digits) for entry in value] if isinstance(value, list | tuple) else value
