"""The output of a streamed run: shards of pruned blocks, put together as one checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
from torch import Tensor

from ghostssm.checkpoint.streamed import StreamedBlocks
from ghostssm.checkpoint.weights import shard_name, write_index
from ghostssm.files import durable
from ghostssm.models.families import family_of
from ghostssm.plan.decision import Selection
from ghostssm.plan.plan import Plan
from ghostssm.plan.surgery import prune_mixer


def gather_shards(
    blocks: StreamedBlocks,
    plan: Plan,
    outside: Sequence[Path],
    pruned: Sequence[tuple[str | None, Path]],
    output: Path,
) -> None:
    """Move shards into a folder under their final names, and write the index over them.

    Mixers that are narrower than the widest are padded to it. What is in its place already stays, so that this can be
    called again after it was ended.

    Args:
        outside: shards of the tensors outside the blocks, and of those that no block loads.
        pruned: for each block the name of its mixer, if it has one, and its shard.
    """
    shards = [*((None, shard) for shard in outside), *pruned]
    for number, (name, shard) in enumerate(shards):
        place = output / shard_name(number, len(shards))
        if place.exists():
            continue
        if name is None or plan.decisions[name].width == plan.kept_state_size:
            shard.rename(place)
            continue
        durable.write_tensors(place, _padded(blocks, number - len(outside), shard, plan, name))
        shard.unlink()
    write_index(output)


def _padded(blocks: StreamedBlocks, index: int, shard: Path, plan: Plan, name: str) -> dict[str, Tensor]:
    """The tensors of block ``index``, pruned in ``shard``, with as many channels as the widest mixer has."""
    family = family_of(blocks.model.config)
    width = plan.decisions[name].width
    with blocks.opened(index) as block:
        mixer = family.mixer(block, index)
        assert mixer is not None
        prune_mixer(family, mixer, plan.selections[name], width)
        blocks.load_into_opened(safetensors.torch.load_file(shard))
        mixer = family.mixer(block, index)
        assert mixer is not None
        prune_mixer(family, mixer, Selection.whole(mixer.layout), plan.kept_state_size)
        return blocks.stored_block(index, block)
