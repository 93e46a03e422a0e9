"""ghostssm.json: what a checkpoint was made from and with, the hash of every file, and a probe of the model.

The hashes tell of accidents, not of attackers, who can write a manifest as well.
"""

from __future__ import annotations

import functools
import hashlib
import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_origin, get_type_hints

from ghostssm.checkpoint.left_out import LeftOut
from ghostssm.checkpoint.place import is_hub_id
from ghostssm.checkpoint.probe import Overflow, Probe
from ghostssm.errors import ModelError
from ghostssm.files.reading import confined, read_json_object
from ghostssm.plan.distillation import Distillation, distillations_from_json, state_dtype_of
from ghostssm.plan.measurement import Measurement
from ghostssm.plan.provenance import Provenance
from ghostssm.units import text_name
from ghostssm.values import Value

MANIFEST_FILE = "ghostssm.json"
"""A report in a checkpoint's folder; it may be written after the manifest, which does not list it."""
RECORD_FILE = "report.json"
"""What the report shows besides the plan and the manifest."""
_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "scipy", "numba")
"""Whose versions a result may depend on."""
_NO_HASH = ""
_Value = TypeVar("_Value")


def _typed(kind: type[_Value]) -> Callable[[Any], _Value | None]:
    return lambda value: value if type(value) is kind else None


def _size(value: Any) -> int | None:
    return value if type(value) is int and value > 0 else None


def _sizes(value: Any) -> int | tuple[int, ...] | None:
    """One size, or one of every layer."""
    if not isinstance(value, list):
        return _size(value)
    sizes = tuple(size for each in value if (size := _size(each)) is not None)
    return sizes if value and len(sizes) == len(value) else None


def _object(read: Callable[[Any], _Value]) -> Callable[[Any], dict[str, _Value]]:
    """Reads an object whose entries ``read`` reads; empty for anything else."""
    return lambda value: {name: read(each) for name, each in value.items()} if isinstance(value, dict) else {}


def _list_of_texts(value: Any) -> tuple[str, ...]:
    return tuple(map(str, value)) if isinstance(value, list) else ()


def _left_out(value: Any) -> LeftOut | None:
    return None if value is None else LeftOut.from_json(value)


def _is_true(value: Any) -> bool:
    return value is True


_text, _texts = _typed(str), _object(_typed(str))


@dataclass(frozen=True)
class FileRecord:
    """SHA-256, hexadecimal, and size of a file; without a hash where a manifest has something else."""

    sha256: str
    bytes: int

    @classmethod
    def of(cls, path: Path) -> FileRecord:
        return cls(file_hash(path), path.stat().st_size)

    @classmethod
    def from_json(cls, value: Any) -> FileRecord:
        sha256, size = (value.get("sha256"), value.get("bytes")) if isinstance(value, dict) else (None, None)
        return cls(_text(sha256) or _NO_HASH, _typed(int)(size) or 0)


@dataclass(frozen=True, repr=False)
class Manifest(Value):
    """What ghostssm.json says; what it does not say, or not as this version knows it, is None or empty.

    A field's annotation has the function that makes it of a JSON value, which may be anybody's, or of None.

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
        others: entries of other versions, which stay as they are.
        versions: of Python and the packages that a result may depend on.
        probe: what the model makes of a few tokens.
        files: every other file of the folder, by path within it.
    """

    ghostssm: Annotated[str | None, _text] = None
    base_model: Annotated[str | None, _text] = None
    base_model_sha256: Annotated[str | None, _text] = None
    dialect: Annotated[str | None, _text] = None
    untied_head: Annotated[bool, _is_true] = False
    method: Annotated[str | None, _text] = None
    state_size_before: int | None = None
    state_size_after: int | tuple[int, ...] | None = None
    options: Annotated[Provenance | None, Provenance.from_json] = None
    request: Annotated[Mapping[str, Any] | None, _typed(dict)] = None
    dtype: Annotated[str | None, _text] = None
    device: Annotated[str | None, _text] = None
    distillations: Annotated[tuple[Distillation, ...], distillations_from_json] = ()
    measured: Annotated[Measurement | None, Measurement.from_json] = None
    stored_state_size: Annotated[int | tuple[int, ...] | None, _sizes] = None
    left_out: Annotated[LeftOut | None, _left_out] = None
    missing: Annotated[tuple[str, ...], _list_of_texts] = ()
    overflow: Annotated[Overflow | None, Overflow.from_json] = None
    others: Mapping[str, Any] = field(default_factory=dict)
    versions: Annotated[Mapping[str, str | None], _texts] = field(default_factory=dict)
    probe: Annotated[Probe | None, Probe.from_json] = None
    files: Annotated[Mapping[str, FileRecord], _object(FileRecord.from_json)] = field(default_factory=dict)

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
        """The dtype that the state is to be kept in: trained for, chosen or asked for; None if nothing says so."""
        decided = None if self.options is None else self.options.state_dtype
        return state_dtype_of(self.distillations) or decided

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
        """The same with names in place of the paths that earlier releases wrote for base model and texts."""
        base, options, measured = self.base_model, self.options, self.measured
        if base is not None and not is_hub_id(base):
            base = text_name(base)
        if options is not None:
            text = replace(options.calibration, text=text_name(options.calibration.text))
            options = replace(options, calibration=text)
        if measured is not None:
            measured = replace(measured, text=text_name(measured.text))
        return replace(self, base_model=base, options=options, measured=measured)

    @property
    def state_size(self) -> dict[str, Any] | None:
        """N and N' as the file has them; None unless both are known."""
        sizes = {"before": self.state_size_before, "after": self.state_size_after}
        return None if None in sizes.values() else sizes

    def as_json(self) -> dict[str, Any]:
        """JSON values; of the entries that are not always there, those that say something."""
        entries: dict[str, Any] = {}
        for name in _ENTRIES:
            entries |= self.others if name == "others" else {name: _as_json(getattr(self, name))}
        entries["options"] = entries["options"] or {}
        return {name: value for name, value in entries.items() if value is not None or name == "probe"}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Manifest:
        """From a JSON object, which may be another version's, or anybody's."""
        hints = get_type_hints(cls, include_extras=True).items()
        read = {name: hint.__metadata__[0](document.get(name)) for name, hint in hints if get_origin(hint) is Annotated}
        sizes = document.get("state_size")
        sizes = sizes if isinstance(sizes, dict) else {}
        return cls(
            **read,
            state_size_before=_size(sizes.get("before")),
            state_size_after=_sizes(sizes.get("after")),
            others={name: value for name, value in document.items() if name not in _KNOWN},
        )


_ENTRIES = tuple(
    "state_size" if each.name == "state_size_before" else each.name
    for each in fields(Manifest)
    if each.name != "state_size_after"
)
"""Of ghostssm.json, in their order; ``others`` stands for those of other versions."""
_KNOWN = frozenset({*_ENTRIES, "state_size_before", "state_size_after"})


def _as_json(value: Any) -> Any:
    """A field as JSON has it; None for an empty tuple."""
    if hasattr(value, "as_json"):
        return value.as_json()
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Mapping):
        return {name: _as_json(each) for name, each in value.items()}
    return [_as_json(each) for each in value] or None if isinstance(value, tuple) else value


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
    with confined(path, ModelError).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def versions() -> dict[str, str | None]:
    """Of Python and the packages that a result may depend on; None where one is not installed."""
    installed: dict[str, str | None] = {"python": platform.python_version()}
    return installed | {package: _version_of(package) for package in _PACKAGES}


@functools.cache
def _version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
