"""Rewrite a checkpoint in another dialect, whole or not at all."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from ghostssm.checkpoint import saving
from ghostssm.checkpoint.loading import Checkpoint
from ghostssm.checkpoint.manifest import MANIFEST_FILE, Probe, read_manifest, write_manifest
from ghostssm.checkpoint.output_folder import OutputFolder, storing
from ghostssm.checkpoint.source import Dialect
from ghostssm.errors import InputError
from ghostssm.families import mixers_of
from ghostssm.modeling import GhostMamba2Config
from ghostssm.plan import PLAN_FILE, TENSORS_FILE

_CARRIED = ("README.md", PLAN_FILE, TENSORS_FILE)
"""What was written about a model when it was pruned."""


def export_checkpoint(
    checkpoint: Checkpoint,
    output: Path | str | OutputFolder,
    *,
    dialect: Dialect = "transformers",
    with_tokenizer: bool = True,
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint's model as it is in memory, in either dialect, with what else its folder held.

    Tokenizer, generation config, model card, licence and plan go along; ``ghostssm.json`` says in which dialect and at
    which state size the weights now are.

    Raises:
        InputError: the dialect has no class for the model; nothing was written.
        OutputError: the folder must not or can't be written.
        StorageError: writing failed, for example on a full disk; nothing is left behind.
    """
    if dialect != "transformers":
        require_stock(checkpoint, f"The {dialect} dialect")
    saving.check_dialect(dialect, checkpoint.model.config.model_type, needs_own_class=False)
    folder = output if isinstance(output, OutputFolder) else OutputFolder(output, overwrite)
    with folder, storing(folder.path):
        saving.write_model(checkpoint, folder.partial, dialect)
        saving.carry_over(checkpoint if with_tokenizer else replace(checkpoint, tokenizer=None), folder.partial)
        for name in _CARRIED:
            if (checkpoint.source.folder / name).is_file():
                shutil.copyfile(checkpoint.source.folder / name, folder.partial / name)
        _write_manifest(checkpoint, folder.partial, dialect)
        folder.commit()
    return folder.path


def require_stock(checkpoint: Checkpoint, who: str) -> None:
    """Raise InputError, saying what to do, if only our own class can express a model."""
    if checkpoint.model.config.model_type != GhostMamba2Config.model_type:
        return
    mixers = mixers_of(checkpoint.model)
    if any(mixer.projection is not None for mixer in mixers):
        raise InputError(
            f"{who} has no place for projected states; the model runs in transformers only. "
            "For other engines prune with a method that keeps the stock class, such as output or ghost."
        )
    sizes = [mixer.state_size for mixer in mixers]
    raise InputError(
        f"{who} has no place for a state size per layer ({' '.join(map(str, sizes))}). "
        f"--pad-to {max(sizes)} (ghostssm.pad_state) pads every layer to the widest with zeros, at the same "
        "logits; or prune without --per-layer."
    )


def _write_manifest(checkpoint: Checkpoint, folder: Path, dialect: Dialect) -> None:
    """``ghostssm.json`` of a pruned checkpoint, brought up to date; others have none."""
    if not (checkpoint.source.folder / MANIFEST_FILE).is_file():
        return
    facts = read_manifest(checkpoint.source.folder)
    sizes = sorted({mixer.layout.state_size for mixer in mixers_of(checkpoint.model)})
    facts |= {"dialect": dialect, "stored_state_size": sizes[0] if len(sizes) == 1 else sizes}
    write_manifest(folder, facts, Probe.of(checkpoint.model))
