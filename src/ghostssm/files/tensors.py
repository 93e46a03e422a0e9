"""safetensors files, read without mapping them into memory.

The format: eight bytes, the length of the header, little-endian; the header, a JSON object from tensor names to
``dtype``, ``shape`` and ``data_offsets``; then the data, which the offsets cover without gap or overlap. Everything
outside it is refused before anything is allocated.

A mapped file that another process truncates kills the reader with a signal; a file that is read gives an error. So only
what this process wrote into a folder of its own is mapped (`mapped_tensors`).
"""

from __future__ import annotations

import math
import mmap
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ghostssm.errors import InputError
from ghostssm.files.reading import MOST_JSON_BYTES, confined, parse_json_object

FLOAT_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_LENGTH_BYTES = 8
_MOST_NUMBER = 2**63


class _BrokenError(Exception):
    """A file that is no safetensors file; says why."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a weight file; ``read`` loads it into memory of its own."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors file, as its header has it.

    Attributes:
        dtype: as the format calls it. start, end: bytes from the beginning of the file.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(file: Path, fault: type[InputError]) -> dict[str, Entry]:
    """The tensors of a file by name; the data is not read.

    Raises:
        fault: not a regular file in its folder, truncated, or in any other way not a safetensors file.
    """
    try:
        size = confined(file, fault).stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
            if size < _LENGTH_BYTES or length > size - _LENGTH_BYTES:
                raise _BrokenError("its header is longer than the file")
            if length > MOST_JSON_BYTES:
                raise _BrokenError(f"its header takes {length} bytes")
            raw = stream.read(length)
        document = parse_json_object(raw, f"The header of {file}", fault)
        data = _LENGTH_BYTES + length
        metadata = document.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise _BrokenError("its metadata are not strings")
        entries = {name: _entry(name, value, data) for name, value in document.items()}
        _check_cover(entries, data, size)
    except (OSError, _BrokenError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise fault(f"{file} is truncated or not a safetensors file ({reason}). Download it again.") from None
    return entries


def read_tensor(file: Path, name: str, entry: Entry, fault: type[InputError]) -> Tensor:
    """One tensor, in memory of its own; raises as `read_at`."""
    return read_at(file, name, entry.start, entry.shape, FLOAT_DTYPES[entry.dtype], fault)


def mapped_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a file in a run's own folder, read-only, and read when their numbers are asked for.

    Raises InputError as `read_header`.
    """
    entries = read_header(file, InputError)
    with file.open("rb") as stream:
        room = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
        return {
            name: torch.frombuffer(
                room, dtype=FLOAT_DTYPES[entry.dtype], count=math.prod(entry.shape), offset=entry.start
            ).view(entry.shape)
            for name, entry in entries.items()
        }


def read_at(
    file: Path, name: str, start: int, shape: tuple[int, ...], dtype: torch.dtype, fault: type[InputError]
) -> Tensor:
    """The numbers from byte ``start`` of a file on, in memory of their own; ``name`` is what a message calls them.

    Raises:
        fault: the file has become shorter or can't be read any more.
    """
    tensor = torch.empty(shape, dtype=dtype)
    room = tensor.reshape(-1).view(torch.uint8).numpy().data
    try:
        with file.open("rb") as stream:
            stream.seek(start)
            done = 0
            while done < len(room) and (count := stream.readinto(room[done:])):
                done += count
    except OSError as error:
        raise fault(f"{name} in {file} can't be read: {error.strerror or error}.") from None
    if done < len(room):
        raise fault(
            f"{file} was truncated while {name} was read: found {done} of {len(room)} bytes. Download it again."
        )
    return tensor


def _entry(name: str, value: Any, data: int) -> Entry:
    keys = {"dtype", "shape", "data_offsets"}
    well_formed = isinstance(value, dict) and set(value) == keys and isinstance(value["dtype"], str)
    if not well_formed or not all(_are_counts(value[key]) for key in ("shape", "data_offsets")):
        raise _BrokenError(f"its entry {name!r} has no dtype, shape and data_offsets")
    if len(value["data_offsets"]) != 2:
        raise _BrokenError(f"its entry {name!r} has {len(value['data_offsets'])} data_offsets")
    start, end = value["data_offsets"]
    if value["dtype"] in FLOAT_DTYPES:
        needed = math.prod(value["shape"]) * FLOAT_DTYPES[value["dtype"]].itemsize
        if end - start != needed:
            raise _BrokenError(f"{name!r} of shape {value['shape']} has {end - start} bytes, expected {needed}")
    return Entry(value["dtype"], tuple(value["shape"]), data + start, data + end)


def _check_cover(entries: dict[str, Entry], data: int, size: int) -> None:
    """The entries cover the data once."""
    ordered = sorted((entry.start, entry.end, name) for name, entry in entries.items())
    for before, after in pairwise([(data, data, ""), *ordered]):
        if after[0] != before[1] or after[1] < after[0]:
            raise _BrokenError(f"the data of {after[2]!r} overlap others or leave a gap")
    end = ordered[-1][1] if ordered else data
    if end != size:
        raise _BrokenError(f"its tensors end at byte {end} of {size}")


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(count, int) and not isinstance(count, bool) and 0 <= count < _MOST_NUMBER for count in value
    )
