"""Tensors in a checkpoint's files that transformers' class does not load, such as layers that predict further tokens.

They are not in memory with the model, and go from its files into the output's unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from ghostssm.checkpoint.dialects import Dialect, dialect_named
from ghostssm.checkpoint.loading import model_config, stored_dtype
from ghostssm.checkpoint.naming import places_of_parameters
from ghostssm.checkpoint.source import Source
from ghostssm.checkpoint.weights import shard_name, stored_tensors, write_index
from ghostssm.files import durable
from ghostssm.files.tensors import StoredTensor
from ghostssm.models.families import family_of
from ghostssm.models.transformers_private import left_in_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SHARD_BYTES = 1 << 30
"""Of tensors that are copied together: about what a block has where models are streamed."""
_ONLY_IN_MIXERS = ".A_log"


def stored_names(folder: Path, dialect: Dialect) -> dict[str, str]:
    """From the name of every tensor in a folder's weight files to transformers' name for it."""
    return {name: dialect.to_transformers_name(name) for name in stored_tensors(folder)}


def unread_names(model: PreTrainedModel, names: Mapping[str, str]) -> list[str]:
    """Those of `stored_names` that become no parameter or buffer of a model."""
    state = model.state_dict()
    places = places_of_parameters(model, names.values())
    unread = {name for place, stored in places.items() if place not in state for name in stored}
    return [name for name, ours in names.items() if ours in unread]


def carried_tensors(model: PreTrainedModel, source: Source) -> dict[str, StoredTensor]:
    """A source's unread tensors that every checkpoint of its model gets, if the dialect has a place for them.

    These are the weights that its class leaves in the files for other engines. Buffers of older versions, which are
    computed anew, are no such weights. Where such layers have Mamba-2 mixers and the model's state size has changed,
    no engine could use them, so none of the layers is carried over.
    """
    patterns = left_in_files(model)
    if not source.has_files or not dialect_named(source.dialect).keeps_unread or not patterns:
        return {}
    stored = stored_tensors(source.folder)
    unread = unread_names(model, {name: name for name in stored})
    wanted = [name for name in unread if any(re.search(pattern, name) for pattern in patterns)]
    if any(name.endswith(_ONLY_IN_MIXERS) for name in wanted) and not _has_state_of(model, source):
        return {}
    return {name: stored[name] for name in wanted}


def _has_state_of(model: PreTrainedModel, source: Source) -> bool:
    family, original = family_of(model.config), model_config(source)
    return family.layout(model.config).state_size == family.layout(original).state_size


def carried_pieces(model: PreTrainedModel, source: Source) -> Iterator[dict[str, Tensor]]:
    """The carried tensors, about as many at a time as one block has.

    They stay as they are stored. Only if the model was loaded in another dtype than its files have, they get that
    dtype too.
    """
    carried = carried_tensors(model, source)
    if not carried:
        return
    usual = stored_dtype(stored_tensors(source.folder))
    piece: dict[str, Tensor] = {}
    size = 0
    for name, tensor in carried.items():
        value = tensor.read()
        piece[name] = value.to(model.dtype) if tensor.dtype == usual else value
        size += piece[name].nbytes
        if size >= _SHARD_BYTES:
            yield piece
            piece, size = {}, 0
    if piece:
        yield piece


def add_carried(model: PreTrainedModel, source: Source, folder: Path) -> None:
    """Add what is carried over to the weights in a folder, in shards of their own."""
    added = []
    for number, piece in enumerate(carried_pieces(model, source)):
        added.append(folder / f"carried-{number}.safetensors")
        durable.write_tensors(added[-1], piece)
    if not added:
        return
    shards = [*sorted(folder.glob("model*.safetensors")), *added]
    # Counted up from the first, no name is taken by a shard that has yet to be renamed.
    for number, shard in enumerate(shards):
        shard.rename(folder / shard_name(number, len(shards)))
    write_index(folder)
