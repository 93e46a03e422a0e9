"""ghostssm.json: what a checkpoint was made from and with, the hash of every file, and a probe of the model.

The hashes tell of accidents, not of attackers, who can write a manifest as well.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from ghostssm.checkpoint.left_out import LeftOut
from ghostssm.checkpoint.source import is_hub_id
from ghostssm.errors import CONVERT, ModelError
from ghostssm.files.reading import confined, read_json_object
from ghostssm.plan.distillation import Distillation, distillations_from_json
from ghostssm.plan.measurement import Measurement
from ghostssm.plan.provenance import Provenance
from ghostssm.units import text_name
from ghostssm.values import Value

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MANIFEST_FILE = "ghostssm.json"
PAGE_FILE = "report.html"
"""A report in a checkpoint's folder; it may be written after the manifest, which does not list it."""
RECORD_FILE = "report.json"
"""What the report shows besides the plan and the manifest."""
_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "scipy", "numba")
"""Whose versions a result may depend on."""
_PROBE_TOKENS = 16
_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3}
_HALF_TOLERANCE = 0.1
_NO_HASH = ""
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Probe:
    """What a model makes of a few tokens: enough to see that it is the same model.

    Those of ghostssm are computed in float32, or float64 of such weights, whatever the dtype of the weights: in half
    precision they would differ more between processors, and may not be finite.

    Attributes:
        token_ids: the input, one sequence.
        mean, deviation, largest: of the logits at every position.
        tolerance: by how many standard deviations of a position's logits mean and largest may differ elsewhere, and by
            which share the deviation may; processors and versions round differently.
        dtype: that the logits were computed in.
    """

    token_ids: Sequence[int]
    mean: Sequence[float]
    deviation: Sequence[float]
    largest: Sequence[float]
    tolerance: float
    dtype: str

    @classmethod
    def of(cls, model: PreTrainedModel, token_ids: Sequence[int] | None = None) -> Probe | None:
        """Run a model on some tokens, or on tokens of our choice; None if its logits are not finite."""
        ids = probe_tokens(model.config.vocab_size) if token_ids is None else token_ids
        tokens = torch.tensor([list(ids)], device=model.device)
        with torch.inference_mode():
            logits = model(input_ids=tokens, return_dict=True, use_cache=False).logits[0]
        return cls.of_logits(ids, logits, model.dtype)

    @classmethod
    def of_logits(cls, token_ids: Sequence[int], logits: Tensor, dtype: torch.dtype) -> Probe | None:
        """From the logits (l, vocab) of a model in a dtype; None if they are not finite."""
        logits = logits.double()
        if not torch.isfinite(logits).all():
            return None
        return cls(
            tuple(token_ids),
            tuple(logits.mean(-1).tolist()),
            tuple(logits.std(-1).tolist()),
            tuple(logits.amax(-1).tolist()),
            _TOLERANCES.get(dtype, _HALF_TOLERANCE),
            str(dtype).removeprefix("torch."),
        )

    @classmethod
    def from_json(cls, found: Any) -> Probe | None:
        """What a manifest has; None for what is no probe."""
        try:
            tokens = tuple(found["token_ids"])
            mean, deviation, largest = (tuple(map(float, found[name])) for name in ("mean", "deviation", "largest"))
            tolerance, dtype = float(found["tolerance"]), str(found["dtype"])
        except (KeyError, TypeError, ValueError, OverflowError):
            return None
        known = dtype in ("float64", "float32", "float16", "bfloat16") and all(type(token) is int for token in tokens)
        same_length = len(tokens) == len(mean) == len(deviation) == len(largest)
        finite = all(map(math.isfinite, (tolerance, *mean, *deviation, *largest)))
        return cls(tokens, mean, deviation, largest, tolerance, dtype) if known and same_length and finite else None

    def difference(self, other: Probe) -> float:
        """The largest difference at any position, in standard deviations of its logits."""
        pairs = ((self.mean, other.mean), (self.deviation, other.deviation), (self.largest, other.largest))
        return max(
            abs(found - wanted) / max(deviation, 1e-12)
            for ours, others in pairs
            for wanted, found, deviation in zip(ours, others, self.deviation, strict=True)
        )


@dataclass(frozen=True)
class Overflow:
    """Where a model's numbers leave the range of the dtype that its weights are stored in.

    Attributes:
        dtype: without ``torch.``. part: the first block, or the head, whose output is not finite.
    """

    dtype: str
    part: str

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Overflow | None:
        """What a manifest has; None for what is no overflow."""
        dtype, part = found.get("dtype"), found.get("part")
        return cls(dtype, part) if isinstance(dtype, str) and isinstance(part, str) else None

    @property
    def text(self) -> str:
        wider, convert = "bfloat16 or float32", f"{CONVERT} (or f32)"
        if self.dtype == "bfloat16":
            wider, convert = "float32", CONVERT.replace("bf16", "f32")
        return (
            f"In {self.dtype}, in which the weights are stored, the output of {self.part} is not finite; in float32 it "
            f"is. Run the model in {wider}, or convert it: {convert}."
        )


@dataclass(frozen=True)
class FileRecord:
    """SHA-256, hexadecimal, and size of a file; without a hash where a manifest has something else."""

    sha256: str
    bytes: int

    @classmethod
    def of(cls, path: Path) -> FileRecord:
        return cls(file_hash(path), path.stat().st_size)

    @classmethod
    def from_json(cls, found: Any) -> FileRecord:
        values = found if isinstance(found, dict) else {}
        return cls(_typed(values.get("sha256"), str) or _NO_HASH, _typed(values.get("bytes"), int) or 0)


@dataclass(frozen=True, repr=False)
class Manifest(Value):
    """What ghostssm.json says; what it does not say, or not as this version knows it, is None or empty.

    Attributes:
        ghostssm: the version that pruned the model.
        base_model: the name of the model that was pruned.
        base_model_sha256: `Source.fingerprint` of its files.
        dialect: of the folder.
        untied_head: whether the base model ties the head that this one does not.
        method: the recipe.
        state_size_before: N.
        state_size_after: N', one number where all layers have the same.
        options: what the plan was made from and with.
        request: what was asked for, JSON values.
        dtype: of the weights.
        device: that the model was pruned on.
        distillations: trainings of the whole pruned model.
        measured: the loss before and after.
        stored_state_size: of an exported copy, which may be padded; where layers differ, every size there is.
        left_out: what of the base model the output has no place for.
        missing: what could not be written.
        overflow: where the dtype is too narrow.
        versions: of Python and the packages that a result may depend on.
        probe: what the model makes of a few tokens.
        files: every other file of the folder, by path within it.
        others: entries of other versions, which stay as they are.
    """

    ghostssm: str | None = None
    base_model: str | None = None
    base_model_sha256: str | None = None
    dialect: str | None = None
    untied_head: bool = False
    method: str | None = None
    state_size_before: int | None = None
    state_size_after: int | tuple[int, ...] | None = None
    options: Provenance | None = None
    request: Mapping[str, Any] | None = None
    dtype: str | None = None
    device: str | None = None
    distillations: tuple[Distillation, ...] = ()
    measured: Measurement | None = None
    stored_state_size: int | tuple[int, ...] | None = None
    left_out: LeftOut | None = None
    missing: tuple[str, ...] = ()
    overflow: Overflow | None = None
    versions: Mapping[str, str | None] = field(default_factory=dict)
    probe: Probe | None = None
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    others: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def is_in(folder: Path) -> bool:
        """Whether a folder has a manifest, which may be broken."""
        return (folder / MANIFEST_FILE).is_file()

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a folder.

        Raises:
            ModelError: there is none, or it is broken.
        """
        try:
            return cls.from_json(read_json_object(folder / MANIFEST_FILE, ModelError))
        except FileNotFoundError:
            raise ModelError(
                f"{folder} holds no {MANIFEST_FILE}; expected a checkpoint that ghostssm wrote, which says what it "
                "holds."
            ) from None

    @property
    def state_dtype(self) -> str | None:
        """The dtype that the state is to be kept in, chosen or asked for; None if neither."""
        return None if self.options is None else self.options.state_dtype

    def write(self, folder: Path, place: Path | None = None) -> None:
        """Write the manifest of a folder whose other files are all written, with their hashes and today's versions.

        Args:
            folder: whose manifest it is.
            place: folder to write it into; that folder itself if not given.
        """
        whole = replace(self, versions=versions(), files=file_records(folder))
        text = json.dumps(whole.as_json(), indent=1) + "\n"
        ((place or folder) / MANIFEST_FILE).write_text(text, encoding="utf-8")

    def published(self) -> Manifest:
        """With names where earlier releases wrote where base model and texts lay on a machine."""
        base, options, measured = self.base_model, self.options, self.measured
        if base is not None and not is_hub_id(base):
            base = text_name(base)
        if options is not None:
            text = replace(options.calibration, text=text_name(options.calibration.text))
            options = replace(options, calibration=text)
        if measured is not None:
            measured = replace(measured, text=text_name(measured.text))
        return replace(self, base_model=base, options=options, measured=measured)

    def as_json(self) -> dict[str, Any]:
        """JSON values; of the entries that are not always there, those that say something."""
        sizes = {"before": self.state_size_before, "after": self.state_size_after}
        found = {
            "ghostssm": self.ghostssm,
            "base_model": self.base_model,
            "base_model_sha256": self.base_model_sha256,
            "dialect": self.dialect,
            "untied_head": self.untied_head,
            "method": self.method,
            "state_size": None if None in sizes.values() else sizes,
            "options": {} if self.options is None else self.options.as_json(),
            "request": None if self.request is None else dict(self.request),
            "dtype": self.dtype,
            "device": self.device,
            "distillations": [each.as_json() for each in self.distillations] or None,
            "measured": None if self.measured is None else self.measured.as_json(),
            "stored_state_size": self.stored_state_size,
            "left_out": None if self.left_out is None else self.left_out.as_json(),
            "missing": self.missing or None,
            "overflow": None if self.overflow is None else asdict(self.overflow),
            **self.others,
        }
        return {name: value for name, value in found.items() if value is not None} | {
            "versions": dict(self.versions),
            "probe": None if self.probe is None else asdict(self.probe),
            "files": {name: asdict(record) for name, record in self.files.items()},
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Manifest:
        """From a JSON object, which may be another version's, or anybody's."""

        def part(name: str) -> Mapping[str, Any]:
            return value if isinstance(value := found.get(name), dict) else {}

        def text(name: str) -> str | None:
            return _typed(found.get(name), str)

        missing, left_out, sizes = found.get("missing"), found.get("left_out"), part("state_size")
        return cls(
            ghostssm=text("ghostssm"),
            base_model=text("base_model"),
            base_model_sha256=text("base_model_sha256"),
            dialect=text("dialect"),
            untied_head=found.get("untied_head") is True,
            method=text("method"),
            state_size_before=_size(sizes.get("before")),
            state_size_after=_sizes(sizes.get("after")),
            options=Provenance.from_json(found.get("options")),
            request=_typed(found.get("request"), dict),
            dtype=text("dtype"),
            device=text("device"),
            distillations=distillations_from_json(found.get("distillations")),
            measured=Measurement.from_json(found.get("measured")),
            stored_state_size=_sizes(found.get("stored_state_size")),
            left_out=None if left_out is None else LeftOut.from_json(left_out),
            missing=tuple(map(str, missing)) if isinstance(missing, list) else (),
            overflow=Overflow.from_json(part("overflow")),
            versions={name: _typed(value, str) for name, value in part("versions").items()},
            probe=Probe.from_json(found.get("probe")),
            files={name: FileRecord.from_json(record) for name, record in part("files").items()},
            others={name: value for name, value in found.items() if name not in _ENTRIES},
        )


_ENTRIES = frozenset({*Manifest.__dataclass_fields__, "state_size"})


def _typed(value: Any, kind: type[_Value]) -> _Value | None:
    return value if type(value) is kind else None


def _size(value: Any) -> int | None:
    size = _typed(value, int)
    return size if size is not None and size > 0 else None


def _sizes(value: Any) -> int | tuple[int, ...] | None:
    """One size, or one of every layer."""
    if not isinstance(value, list):
        return _size(value)
    sizes = tuple(size for each in value if (size := _size(each)) is not None)
    return sizes if value and len(sizes) == len(value) else None


def probe_tokens(vocabulary: int) -> list[int]:
    """The tokens that a new probe is taken with."""
    return [7919 * (place + 1) % vocabulary for place in range(_PROBE_TOKENS)]


def file_records(folder: Path) -> dict[str, FileRecord]:
    """The fingerprint of every file in a folder, by its path there; without the manifest and the record of a report."""
    apart = (folder / MANIFEST_FILE, folder / RECORD_FILE)
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path not in apart)
    return {path.relative_to(folder).as_posix(): FileRecord.of(path) for path in paths}


def file_hash(path: Path) -> str:
    """SHA-256 of a file, hexadecimal.

    Raises:
        ModelError: a link out of its folder, or no regular file.
    """
    total = hashlib.sha256()
    with confined(path, ModelError).open("rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()


def versions() -> dict[str, str | None]:
    """Of Python and the packages that a result may depend on; None where one is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found
