"""The tensors of a checkpoint by name, known before any of them is read."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from ghostssm.errors import ModelError

_TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_QUANTISED_PARTS = frozenset({"qweight", "qzeros", "g_idx", "SCB", "absmax", "weight_scale", "weight_scale_inv"})
"""Last parts of the names that GPTQ, AWQ, bitsandbytes and FP8 give to what stands beside the numbers of a weight."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a weight file; ``read`` loads it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    read: Callable[[], Tensor]


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor in a folder's weight files: safetensors or pytorch_model.bin, whole or sharded.

    Of safetensors only the headers are read; .bin files are memory-mapped and unpickled with ``weights_only``.

    Raises:
        ModelError: no weight file, a shard that the index names is missing, a file that is truncated or broken, or
            quantised weights.
    """
    for stem, suffix, reader in (("model", "safetensors", _read_header), ("pytorch_model", "bin", _map_pickle)):
        index = folder / f"{stem}.{suffix}.index.json"
        whole = folder / f"{stem}.{suffix}"
        if index.exists():
            files = _shards(index)
        elif whole.exists():
            files = [whole]
        else:
            continue
        tensors: dict[str, StoredTensor] = {}
        for file in files:
            tensors |= reader(file)
        return tensors
    raise ModelError(
        f"{folder} holds no weights; expected model.safetensors or pytorch_model.bin, or their shards with an index."
    )


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is not a shard index ({type(error).__name__}: {error}).") from None
    if outside:
        raise ModelError(f"{index} names {outside[0]!r}; expected plain file names in the same folder.")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise ModelError(
            f"{index} names {len(missing)} missing weight files: {', '.join(missing)}. Download them again."
        )
    return [index.parent / name for name in names]


def _read_header(file: Path) -> dict[str, StoredTensor]:
    tensors = {}
    try:
        with safetensors.safe_open(file, framework="pt") as handle:
            names = handle.keys()
            for name in names:
                part = handle.get_slice(name)
                dtype = _plain_dtype(name, _TORCH_DTYPES.get(part.get_dtype()), part.get_dtype(), file)
                tensors[name] = StoredTensor(tuple(part.get_shape()), dtype, file, partial(_read_one, file, name))
    except (safetensors.SafetensorError, OSError) as error:
        raise ModelError(f"{file} is truncated or not a safetensors file ({error}). Download it again.") from None
    return tensors


def _read_one(file: Path, name: str) -> Tensor:
    with safetensors.safe_open(file, framework="pt") as handle:
        tensor: Tensor = handle.get_tensor(name)
        return tensor


def _map_pickle(file: Path) -> dict[str, StoredTensor]:
    try:
        # Files from before PyTorch 1.6 are no zip archives and can't be mapped.
        mapped = zipfile.is_zipfile(file)
        loaded: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # zip, pickle and torch faults share no base class
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(
            f"{file} is truncated or not a plain PyTorch weight file ({reason}). Download it again."
        ) from None
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise ModelError(f"{file} does not hold a dictionary of tensors; expected a model's state_dict.")
    return {
        name: StoredTensor(
            tuple(value.shape), _plain_dtype(name, value.dtype, str(value.dtype), file), file, partial(_same, value)
        )
        for name, value in loaded.items()
    }


def _plain_dtype(name: str, dtype: torch.dtype | None, stored_as: str, file: Path) -> torch.dtype:
    """The dtype of a tensor that is no part of a quantised weight."""
    if dtype is None or dtype not in _TORCH_DTYPES.values() or name.rpartition(".")[2] in _QUANTISED_PARTS:
        raise ModelError(
            f"{name} in {file} is stored as {stored_as}, as quantised checkpoints have it; expected floating-point "
            "weights. Prune the unquantised model, then quantise the result."
        )
    return dtype


def _same(tensor: Tensor) -> Tensor:
    return tensor


def shape_faults(
    stored: Mapping[str, StoredTensor], expected: Mapping[str, tuple[int, ...]], optional: set[str]
) -> list[str]:
    """Every way in which stored tensors contradict the names and shapes that a config implies."""
    faults = [
        f"{name} has shape {stored[name].shape} in {stored[name].file.name}, but the config implies {shape}"
        for name, shape in expected.items()
        if name in stored and stored[name].shape != shape
    ]
    faults += [
        f"{name} {shape} is missing" for name, shape in expected.items() if name not in stored and name not in optional
    ]
    faults += [
        f"{name} {info.shape} belongs to no part of the model" for name, info in stored.items() if name not in expected
    ]
    return faults
