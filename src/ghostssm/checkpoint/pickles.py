"""pytorch_model.bin: what a plain weight file may ask of the unpickler, and how much it may hold.

``weights_only`` keeps a pickle from running code; it still lets one allocate without bound, for example a bytearray of
a trillion zeros. Plain weight files need very few names, so that the others are refused before torch reads the file.

Of a zip archive, as torch.save has written since PyTorch 1.6, only the pickle is read, which says where in the archive
the numbers of each tensor are; these are then read one tensor at a time. Nothing is mapped: a mapped file that is cut
short ends the process with a signal.
"""

from __future__ import annotations

import pickletools
import sys
import zipfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ghostssm.errors import ModelError, first_line
from ghostssm.files.reading import confined
from ghostssm.files.tensors import StoredTensor, read_at

_STORAGES = ("BFloat16", "Half", "Float", "Double", "Long", "Int", "Short", "Char", "Byte", "Bool")
_NAMES = frozenset(
    {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"}
    | {f"torch {kind}Storage" for kind in _STORAGES}
    # How dtypes without a storage class of their own are stored: float8, of which the message should say what it is.
    | {"torch._utils _rebuild_tensor_v3", "torch.storage UntypedStorage"}
    | {f"torch {kind}" for kind in ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz")}
)
_MOST_PICKLE_BYTES = 64 << 20
_OLD_PICKLES = 5
"""Files from before PyTorch 1.6 hold so many in a row: magic number, protocol, machine, tensors, keys of storages."""


_LOCAL_HEADER_BYTES = 30
"""Of a zip archive's member, before its name and its extra field."""


def read_weight_pickle(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a .bin file by name, none of them read yet.

    Files from before PyTorch 1.6, of another byte order, or packed anew by something else, are read as a whole.

    Raises:
        ModelError: truncated, no dictionary of tensors, or a pickle that asks for more than plain weights need. Reading
            a tensor raises it where the file has become shorter.
    """
    confined(file, ModelError)
    try:
        archive = zipfile.is_zipfile(file)
        _check_names(file, archive)
        members = _members(file) if archive else None
        # On the meta device torch notes where each storage is, and reads none.
        loaded = _unpickled(file, "cpu" if members is None else "meta")
        if members is not None and not _is_placed(loaded, members):
            members, loaded = None, _unpickled(file, "cpu")
    except (ModelError, MemoryError):
        raise
    except Exception as error:  # zip, pickle and torch faults share no base class
        raise ModelError(
            f"{file} is truncated or not a plain PyTorch weight file ({first_line(error)}). Download it again."
        ) from None
    named = isinstance(loaded, dict) and all(isinstance(name, str) for name in loaded)
    if not named or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise ModelError(f"{file} does not hold a dictionary of tensors; expected a model's state_dict.")
    _check_storage(file, loaded, members)
    return {
        name: StoredTensor(
            tuple(value.shape),
            value.dtype,
            file,
            # A copy, since tied tensors share their numbers.
            partial(torch.clone, value, memory_format=torch.contiguous_format)
            if members is None
            else partial(_read, file, name, value),
        )
        for name, value in loaded.items()
    }


def _unpickled(file: Path, place: str) -> Any:
    return torch.load(file, map_location=place, weights_only=True, mmap=False)


def _is_placed(loaded: Any, members: Mapping[int, int]) -> bool:
    """Whether the places that torch worked out are those in the archive, which something else may have written."""
    tensors = loaded.values() if isinstance(loaded, dict) else ()
    return all(_start(value) in members for value in tensors if isinstance(value, Tensor))


def _read(file: Path, name: str, described: Tensor) -> Tensor:
    """The numbers of a tensor that torch described on the meta device."""
    extent = _extent(described)
    start = _start(described) + int(described.storage_offset()) * described.element_size()
    numbers = read_at(file, name, start, (extent,), described.dtype, ModelError)
    return numbers.as_strided(described.shape, described.stride()).contiguous()


def _start(described: Tensor) -> int:
    """Where in the archive the storage of a tensor on the meta device begins."""
    storage: Any = described.untyped_storage()
    return int(storage._checkpoint_offset)


def _extent(tensor: Tensor) -> int:
    """How many numbers of its storage a tensor spans, from its first on."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))


def _members(file: Path) -> dict[int, int] | None:
    """Where the data of an archive's members begin, and how many bytes they have; None for another byte order."""
    with file.open("rb") as stream, zipfile.ZipFile(stream) as archive:
        sizes = {}
        for member in archive.infolist():
            if member.filename.endswith("/byteorder") and archive.read(member).decode() != sys.byteorder:
                return None
            stream.seek(member.header_offset)
            header = stream.read(_LOCAL_HEADER_BYTES)
            names = sum(int.from_bytes(header[place : place + 2], "little") for place in (26, 28))
            sizes[member.header_offset + _LOCAL_HEADER_BYTES + names] = member.file_size
        return sizes


def _check_names(file: Path, archive: bool) -> None:
    if archive:
        with zipfile.ZipFile(file) as members:
            pickles = [m for m in members.infolist() if m.filename.lower().endswith("data.pkl")]
            if len(pickles) != 1 or any(m.compress_type != zipfile.ZIP_STORED for m in members.infolist()):
                raise ModelError(f"{file} is an archive, but not one that torch.save writes.")
            with members.open(pickles[0]) as stream:
                names = set(_names(stream))
    else:
        with file.open("rb") as stream:
            names = {name for _ in range(_OLD_PICKLES) for name in _names(stream)}
    if surplus := names - _NAMES:
        raise ModelError(f"{file} asks for {min(surplus)!r} when it is unpickled, which no plain weight file needs.")


def _names(stream: Any) -> Iterator[str]:
    """What one pickle imports."""
    bounded: BinaryIO = stream
    for opcode, argument, position in pickletools.genops(bounded):
        if position is not None and position > _MOST_PICKLE_BYTES:
            raise ValueError("its pickle is too long")
        if opcode.name in ("GLOBAL", "INST"):
            yield str(argument)
        elif opcode.name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):
            yield opcode.name


def _check_storage(file: Path, tensors: dict[str, Tensor], members: dict[int, int] | None) -> None:
    """Every tensor lies in a storage that the file has, and none repeats its numbers; only tied weights share one."""
    total = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        end = (tensor.storage_offset() + _extent(tensor)) * tensor.element_size()
        stored = tensor.untyped_storage().nbytes() if members is None else members[_start(tensor)]
        if max(size, end) > stored:
            raise ModelError(f"{name} in {file} claims shape {tuple(tensor.shape)} of a smaller storage.")
        total += size
    if total > 2 * file.stat().st_size:
        raise ModelError(f"The tensors in {file} share storage; together they claim {total} bytes, more than it holds.")
