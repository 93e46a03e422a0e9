"""pytorch_model.bin: what a plain weight file may ask of the unpickler, and how much it may hold.

``weights_only`` keeps a pickle from running code; it still lets one allocate without bound, for example a bytearray of
a trillion zeros. Plain weight files need very few names, so that the others are refused before torch reads the file.
"""

from __future__ import annotations

import pickletools
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ghostssm.errors import ModelError
from ghostssm.files.reading import confined

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


def read_weight_pickle(file: Path) -> dict[str, Tensor]:
    """The tensors of a .bin file by name, memory-mapped if the file can be.

    Raises:
        ModelError: truncated, no dictionary of tensors, or a pickle that asks for more than plain weights need.
    """
    confined(file, ModelError)
    try:
        mapped = zipfile.is_zipfile(file)  # older files are no zip archives and can't be mapped
        _check_names(file, mapped)
        loaded: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except (ModelError, MemoryError):
        raise
    except Exception as error:  # zip, pickle and torch faults share no base class
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(
            f"{file} is truncated or not a plain PyTorch weight file ({reason}). Download it again."
        ) from None
    named = isinstance(loaded, dict) and all(isinstance(name, str) for name in loaded)
    if not named or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise ModelError(f"{file} does not hold a dictionary of tensors; expected a model's state_dict.")
    _check_storage(file, loaded)
    return dict(loaded)


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


def _check_storage(file: Path, tensors: dict[str, Tensor]) -> None:
    """No tensor repeats numbers of a smaller storage; only tied weights share one."""
    total = 0
    for name, tensor in tensors.items():
        total += tensor.numel() * tensor.element_size()
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ModelError(f"{name} in {file} claims shape {tuple(tensor.shape)} of a smaller storage.")
    if total > 2 * file.stat().st_size:
        raise ModelError(f"The tensors in {file} share storage; together they claim {total} bytes, more than it holds.")
