"""A streamed run that ended well before: its output, recognised by what its manifest says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ghostssm
from ghostssm.checkpoint.manifest import Manifest
from ghostssm.cli.pruning.job import Job
from ghostssm.cli.pruning.outcome import Outcome
from ghostssm.errors import GhostError
from ghostssm.plan.measurement import Measurement
from ghostssm.streaming.run_folder import run_folder_of
from ghostssm.units import text_name


def may_be_finished(output: Path) -> bool:
    """Whether an output is there and no run is under way that would write it."""
    return Manifest.is_in(output) and not run_folder_of(output).exists()


def finished_outcome(
    job: Job, base_fingerprint: str, windows: ghostssm.Windows, held_out: ghostssm.Windows | None
) -> Outcome | None:
    """The outcome of a job whose output is there; None if that is the output of another one.

    Args:
        base_fingerprint: of the model to prune. windows: to calibrate on. held_out: to measure on, if that is wanted.
    """
    folder = Path(job.output)
    try:
        manifest = Manifest.read(folder)
        plan = ghostssm.Plan.read(folder, changes=False)
    except GhostError:  # not a folder of ours, or a broken one
        return None
    if (made := manifest.options) is None:
        return None
    found = {
        "base": manifest.base_model_sha256,
        "dialect": manifest.dialect,
        "method": manifest.method,
        "state_size": made.requested_state_size,
        "groups": made.groups,
        "seed": made.seed,
        "tokens": made.calibration.tokens_sha256,
    }
    if found != _wanted(job, base_fingerprint, windows) or not _covers(manifest.measured, held_out):
        return None
    return Outcome(folder, plan, manifest.measured)


def _wanted(job: Job, base_fingerprint: str, windows: ghostssm.Windows) -> Mapping[str, Any]:
    return {
        "base": base_fingerprint,
        "dialect": "transformers",
        "method": str(job.recipe),
        "state_size": job.target.size,
        "groups": job.groups,
        "seed": job.seed,
        "tokens": windows.fingerprint,
    }


def _covers(measured: Measurement | None, held_out: ghostssm.Windows | None) -> bool:
    """Whether a measurement is the one that is wanted, if one is."""
    if held_out is None:
        return True
    wanted = (text_name(held_out.text_name), len(held_out), held_out.length)
    return measured is not None and wanted == (text_name(measured.text), measured.windows, measured.window_length)
