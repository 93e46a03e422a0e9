"""Prune a model that does not fit into memory: one block at a time, from its files to the output's."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
import transformers

from ghostssm._version import __version__
from ghostssm.calibration.scratch import Scratch
from ghostssm.checkpoint.streaming import StreamedCheckpoint
from ghostssm.data.windows import Windows
from ghostssm.errors import ProcessError
from ghostssm.feasibility import check_streamable
from ghostssm.interrupts import Terminated
from ghostssm.methods.selection import Groups
from ghostssm.plan import Plan
from ghostssm.processes import Processes
from ghostssm.progress import Progress, silent
from ghostssm.pruning import DEFAULT_SEED, Calibration
from ghostssm.recipe import Recipe
from ghostssm.run_folder import RunFolder


def prune_streamed(
    checkpoint: StreamedCheckpoint,
    windows: Windows,
    recipe: str | Recipe,
    state_size: int,
    output: Path | str,
    *,
    groups: Groups = "equal",
    seed: int = DEFAULT_SEED,
    overwrite: bool = False,
    resume: bool = False,
    offload: Path | None = None,
    processes: Processes | None = None,
    progress: Progress = silent,
) -> Plan:
    """Prune a streamed checkpoint and write the result; bit by bit what `ghostssm.Calibration`,
    `ghostssm.apply_plan` and `ghostssm.save` give for a loaded one, but for the division into files.

    After every block its decision and weights and the windows' hidden states are on disk, in OUTPUT.run.

    Args:
        overwrite: replace an output folder that is not empty.
        resume: go on with what OUTPUT.run holds, if there is such a folder.
        offload: folder for memory-mapped files of all that grows with the windows; memory if not given.
        processes: that share the windows; all must call this with the same arguments, and see the same files.

    Returns:
        the plan. It names the parameters that were repaired; their values are in the output only.

    Raises:
        InputError: as `Calibration.plan`; a recipe that can't be streamed.
        OutputError: the output must not or can't be written, or a run's state is there that this is no part of.
        ProcessError: another process is gone; what is done can be resumed.
    """
    recipe = Recipe.parse(recipe) if isinstance(recipe, str) else recipe
    check_streamable(recipe, checkpoint.blocks.model.config.model_type)
    processes = processes or Processes()
    fingerprint = processes.from_first(checkpoint.source.fingerprint)
    identity = _identity(checkpoint, windows, fingerprint) | {
        "method": str(recipe),
        "state_size": state_size,
        "groups": groups,
        "seed": seed,
        "processes": processes.size,
    }
    processes.share(windows)  # refused if there are too few
    calibration = Calibration(checkpoint.blocks, windows, Scratch(offload), processes)
    with RunFolder(output, identity, resume=resume, overwrite=overwrite, processes=processes) as run:
        try:
            run.begin(checkpoint.blocks)
            plan = calibration.plan(recipe, state_size, groups, seed, progress, journal=run)
            run.finish(checkpoint, plan, fingerprint)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(run.how_to_go_on()) from None
        except Terminated:
            raise Terminated(run.how_to_go_on()) from None
        except ProcessError as error:
            raise ProcessError(f"{error} {run.how_to_go_on()}") from error
    return plan


def _identity(checkpoint: StreamedCheckpoint, windows: Windows, fingerprint: str) -> dict[str, Any]:
    """What decides the numbers of a run besides its recipe."""
    return {
        "ghostssm": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": checkpoint.blocks.device.type,
        "model": fingerprint,
        "text": windows.text_fingerprint,
        "windows": len(windows),
        "window_length": windows.length,
        "tokens": hashlib.sha256(windows.ids.numpy().tobytes()).hexdigest(),
    }
