"""The output of a streamed run: shards of pruned blocks, put together as one checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors.torch
import torch
from torch import Tensor

from ghostssm.checkpoint.weights import header_tensors, shard_name, write_index
from ghostssm.files import durable
from ghostssm.files.tensors import mapped_tensors
from ghostssm.models.families import layout_of
from ghostssm.models.families.own import filled
from ghostssm.models.transformers_private import as_stored, tied_weights
from ghostssm.plan.plan import Plan
from ghostssm.plan.surgery import padded_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def gather_shards(
    model: PreTrainedModel,
    plan: Plan,
    shards: Sequence[tuple[str | None, Path]],
    carried: Sequence[Path],
    output: Path,
    *,
    as_files: bool,
) -> None:
    """Move shards into a folder under their final names, and write the index over them.

    Mixers of a stock model that are narrower than the widest are padded to it. Shards that are in their place already
    stay, so that an interrupted call can be repeated.

    Args:
        model: the pruned model, whose blocks need no weights.
        shards: of its tensors by the names that it has for them, each with the name of the mixer that is in it.
        carried: of tensors that no block loads.
        as_files: bring tensors that transformers writes in another layout than it has in memory into that.
    """
    layout = layout_of(model.config)
    numbered = list(enumerate([*(shard for _, shard in shards), *carried]))
    places = {shard: output / shard_name(number, len(numbered)) for number, shard in numbered}
    for name, shard in shards:
        if places[shard].exists():
            continue
        width = layout.state_size if name is None or plan.needs_own_class else plan.decisions[name].width
        if width == layout.state_size and not (as_files and _is_converted(model, shard)):
            continue
        tensors = safetensors.torch.load_file(shard)
        if width < layout.state_size:
            own = {key: value for key, value in tensors.items() if key.startswith(f"{name}.")}
            tensors |= padded_parameters(layout.with_state_size(width), own, layout.state_size)
        durable.write_tensors(places[shard], as_stored(model, tensors) if as_files else tensors)
        shard.unlink()
    for shard, place in places.items():
        if not place.exists():
            shard.rename(place)
    write_index(output)


def mapped_model(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """A pruned model with the tensors in the shards of a folder, read from there when their numbers are asked for."""
    tensors: dict[str, Tensor] = {}
    for shard in sorted(folder.glob("model-*.safetensors")):
        tensors |= mapped_tensors(shard)
    ties = tied_weights(model)
    return filled(model.config, {name: tensors[other] for name, other in ties.items()} | tensors, ties)


def _is_converted(model: PreTrainedModel, shard: Path) -> bool:
    """Whether files have other names for the tensors of a shard than the model has."""
    shapes = {name: torch.empty(stored.shape, device="meta") for name, stored in header_tensors(shard).items()}
    return as_stored(model, shapes).keys() != shapes.keys()
