"""The dry run: before the work, everything but the weights is written into a folder that is removed again.

The functions that write after the work are called, so that their faults show before they cost that work. The disk is
asked for room for the weights.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from ghostssm.checkpoint import saving
from ghostssm.checkpoint.dialects import dialect_named
from ghostssm.checkpoint.loading import Checkpoint
from ghostssm.checkpoint.side_files import SideFiles
from ghostssm.checkpoint.streamed import StreamedCheckpoint
from ghostssm.errors import OutputError
from ghostssm.files.outputs import OutputFolder, storing
from ghostssm.models.families import mixers_of
from ghostssm.plan.decision import Decision, Selection
from ghostssm.plan.plan import Plan
from ghostssm.progress import stage
from ghostssm.units import bytes_text


def dry_run(checkpoint: Checkpoint, folder: OutputFolder, dialect: str, untie: bool) -> None:
    """Do what `ghostssm.save` will do with a pruned model, but for its weights; nothing is left behind.

    Raises:
        InputError: as `ghostssm.save`.
        ModelError: tokenizer, model card or the like can't be written, with what to do.
        OutputError: the folder can't be written, or its disk has no room for the weights.
        StorageError: writing failed.
    """
    with (
        stage(f"trying whether {folder.path} can be written"),
        folder,
        storing(folder.path),
        saving.untied_head(checkpoint.model, untie) as untied,
    ):
        _check_room(folder.partial, folder.path, stored_bytes(checkpoint))
        _try_side_files(folder.partial, checkpoint, dialect, untied)


def dry_run_streamed(
    folder: Path, output: Path, checkpoint: StreamedCheckpoint, tokens: int, dialect: str, untie: bool
) -> None:
    """As `dry_run`, for a streamed run, which keeps in a folder the weights and the hidden states of all tokens.

    What is in that folder already, since a run goes on, needs no more room.
    """
    # A block's hidden states are removed only when those of the next one are on the disk.
    hidden = 2 * tokens * checkpoint.model.config.hidden_size * torch.float32.itemsize
    there = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    copies = 1 if dialect_named(dialect).has_shards else 2  # the shards go when the one file is whole
    _check_room(folder, output, copies * stored_bytes(checkpoint) + hidden - there)
    with TemporaryDirectory(dir=folder) as place, saving.untied_head(checkpoint.model, untie) as untied:
        _try_side_files(Path(place), checkpoint, dialect, untied)


def _try_side_files(place: Path, checkpoint: Checkpoint | StreamedCheckpoint, dialect: str, untied: bool) -> None:
    """Write config and side files into an empty folder; raises what writing them raises."""
    files = SideFiles(place)
    files.write("config.json", lambda place: saving.write_config(checkpoint.model, place, checkpoint.source, dialect))
    saving.write_beside_weights(files, checkpoint, _whole_plan(checkpoint), dialect, None, "", untied, dry_run=True)


def _check_room(place: Path, output: Path, needed: int) -> None:
    """Raise OutputError if the disk of a folder has less room than so many bytes."""
    disk = shutil.disk_usage(place)
    if disk.total and disk.free < needed:  # some network file systems don't say
        raise OutputError(
            f"{output} needs about {bytes_text(needed)}, its disk has {bytes_text(disk.free)} left; make room, or name "
            "an --output on another disk."
        )


def stored_bytes(checkpoint: Checkpoint | StreamedCheckpoint) -> int:
    """What the unpruned weights take in a file; those of a pruned model take a few hundredths less."""
    model = checkpoint.model
    numbers = sum(parameter.numel() for parameter in model.parameters())
    return int(numbers * model.dtype.itemsize)


def _whole_plan(checkpoint: Checkpoint | StreamedCheckpoint) -> Plan:
    """A plan that keeps everything, to fill in for the one that is to be made."""
    mixers = mixers_of(checkpoint.model)
    layout = mixers[0].layout
    everything = Decision(Selection.whole(layout))
    return Plan(
        method="dry run",
        model_type=checkpoint.model.config.model_type,
        n_groups=layout.n_groups,
        state_size=layout.state_size,
        decisions={mixer.name: everything for mixer in mixers},
    )
