"""The tensors of a checkpoint by name, known before any of them is read."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from reprlib import repr as short

import torch

from ghostssm.checkpoint.pickles import read_weight_pickle
from ghostssm.errors import ModelError
from ghostssm.files import durable
from ghostssm.files.reading import confined, is_plain_name, read_json_object
from ghostssm.files.tensors import FLOAT_DTYPES, StoredTensor, read_header, read_tensor
from ghostssm.units import listed

FORMATS = (("model", "safetensors"), ("pytorch_model", "bin"))
"""Stem and suffix of the weight files that are read, the first that is there: whole, or in shards with an index."""
_LISTED_FAULTS = 3
_QUANTISED_PARTS = frozenset({"qweight", "qzeros", "g_idx", "SCB", "absmax", "weight_scale", "weight_scale_inv"})
"""Last parts of the names that GPTQ, AWQ, bitsandbytes and FP8 give to what stands beside the numbers of a weight."""


_Reader = Callable[[Path], dict[str, StoredTensor]]


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor in a folder's weight files: safetensors or pytorch_model.bin, whole or sharded.

    Of safetensors only the headers are read, of .bin files the pickles, with ``weights_only``. Where there is a whole
    file and an index, the whole file counts, as in transformers.

    Raises:
        ModelError: no weight file, a shard that the index names is missing, a file that is truncated or broken, a
            tensor in two files, one that is not in the file where the index has it, or quantised weights.
    """
    for stem, suffix in FORMATS:
        reader = header_tensors if suffix == "safetensors" else _pickled_tensors
        whole, index = folder / f"{stem}.{suffix}", folder / f"{stem}.{suffix}.index.json"
        if whole.exists() or whole.is_symlink():
            return reader(whole)
        if index.exists() or index.is_symlink():
            return _read_shards(index, suffix, reader)
    check_not_mistral(folder)
    raise ModelError(
        f"{folder} holds no weights; expected model.safetensors or pytorch_model.bin, or their shards with an index."
    )


def _read_shards(index: Path, suffix: str, reader: _Reader) -> dict[str, StoredTensor]:
    places = _places(index, suffix)
    tensors: dict[str, StoredTensor] = {}
    faults = []
    for file in sorted(set(places.values())):
        shard = reader(index.parent / file)
        faults += [f"{name} is in {file} and in {tensors[name].file.name}" for name in shard if name in tensors]
        tensors |= shard
    for name, file in places.items():
        if name not in tensors:
            faults.append(f"{name} is in no shard, expected in {file}")
        elif tensors[name].file.name != file:
            faults.append(f"{name} is in {tensors[name].file.name}, expected in {file}")
    if faults:
        raise ModelError(f"The shards contradict {index}: {listed(faults, _LISTED_FAULTS, '; ')}.")
    return tensors


def check_not_mistral(folder: Path) -> None:
    """Raise ModelError, saying what to do, for a folder in Mistral's own format."""
    if (folder / "params.json").exists() or any(folder.glob("consolidated*.safetensors")):
        raise ModelError(
            f"{folder} is in Mistral's own format (params.json, consolidated.safetensors); expected transformers' "
            "(config.json, model.safetensors). Look for it in another revision of the repository (refs/pr/9 of "
            "mistralai/Mamba-Codestral-7B-v0.1: `hf download ... --revision refs/pr/9 --local-dir DIR`), or convert "
            "the weights with convert_mamba2_ssm_checkpoint_to_pytorch.py of transformers 4, and name that folder."
        )


def shard_places(index: Path, suffix: str) -> dict[str, str]:
    """Tensor name to the file beside the index that it puts it in; raises ModelError if it names anything else."""
    places = read_json_object(index, ModelError).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise ModelError(f"{index} is not a shard index; expected an object weight_map of tensor and file names.")
    outside = [
        name for name in sorted(set(places.values())) if not is_plain_name(name) or Path(name).suffix != f".{suffix}"
    ]
    if outside:
        raise ModelError(
            f"{index} names {short(outside[0])}; expected plain names of .{suffix} files in the same folder."
        )
    return places


def _places(index: Path, suffix: str) -> dict[str, str]:
    """As `shard_places`, where every file is there."""
    places = shard_places(index, suffix)
    names = sorted(set(places.values()))
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise ModelError(f"{index} names {len(missing)} missing weight files: {', '.join(missing[:_LISTED_FAULTS])}.")
    for name in names:
        confined(index.parent / name, ModelError)
    return places


def header_tensors(file: Path) -> dict[str, StoredTensor]:
    """Every tensor in a safetensors file; raises ModelError if it is broken."""
    tensors = {}
    for name, entry in read_header(file, ModelError).items():
        dtype = _plain_dtype(name, FLOAT_DTYPES.get(entry.dtype), entry.dtype, file)
        tensors[name] = StoredTensor(entry.shape, dtype, file, partial(read_tensor, file, name, entry, ModelError))
    return tensors


def _pickled_tensors(file: Path) -> dict[str, StoredTensor]:
    tensors = read_weight_pickle(file)
    for name, tensor in tensors.items():
        _plain_dtype(name, tensor.dtype, str(tensor.dtype), file)
    return tensors


def _plain_dtype(name: str, dtype: torch.dtype | None, stored_as: str, file: Path) -> torch.dtype:
    """The dtype of a tensor that is no part of a quantised weight."""
    if dtype is None or dtype not in FLOAT_DTYPES.values() or name.rpartition(".")[2] in _QUANTISED_PARTS:
        raise ModelError(
            f"{name} in {file} is stored as {stored_as}, as quantised checkpoints have it; expected floating-point "
            "weights. Prune the unquantised model, then quantise the result."
        )
    return dtype


def shard_name(number: int, count: int) -> str:
    """Of one of ``count`` weight files, counted from 0, as transformers names them."""
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def write_index(folder: Path) -> None:
    """Write model.safetensors.index.json over all shards in a folder."""
    where: dict[str, str] = {}
    size = 0
    for file in sorted(folder.glob("model-*.safetensors")):
        stored = header_tensors(file)
        where |= dict.fromkeys(stored, file.name)
        size += sum(torch.Size(value.shape).numel() * value.dtype.itemsize for value in stored.values())
    durable.write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": where})
