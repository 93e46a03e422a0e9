"""A streamed run that ended well before: its output, recognised by what its manifest says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ghostssm.checkpoint.manifest import Manifest
from ghostssm.errors import GhostError
from ghostssm.plan.measurement import Measurement
from ghostssm.plan.plan import Plan
from ghostssm.streaming.run import StreamedRun, options_of
from ghostssm.streaming.run_places import run_folder_of
from ghostssm.text.windows import Windows
from ghostssm.units import text_name


def may_be_finished(output: Path) -> bool:
    """Whether an output is there and no run is under way that would write it."""
    return Manifest.is_in(output) and not run_folder_of(output).exists()


def finished_run(
    folder: Path, base_fingerprint: str, request: Mapping[str, Any], windows: Windows, held_out: Windows | None
) -> StreamedRun | None:
    """What a run ended in whose output is there; None if that is the output of another run.

    Args:
        base_fingerprint: of the model to prune. request: what is asked for, JSON values.
        windows: to calibrate on. held_out: to measure on, if that is wanted.
    """
    try:
        manifest, plan = Manifest.read(folder), Plan.read(folder, changes=False)
        options = None if manifest.request is None else options_of(manifest.request)
    except (GhostError, KeyError, TypeError):  # not a folder of ours, or a broken one
        return None
    made = manifest.options
    if options is None or made is None or not _covers(manifest.measured, held_out):
        return None
    wanted = options_of(request) | {"text_windows": options.get("text_windows")}  # their number was just compared
    written = (manifest.base_model_sha256, made.calibration.tokens_sha256)
    if written != (base_fingerprint, windows.fingerprint) or options != wanted:
        return None
    return StreamedRun(plan, manifest.measured)


def _covers(measured: Measurement | None, held_out: Windows | None) -> bool:
    """Whether a measurement is the one that is wanted, if one is."""
    if held_out is None:
        return True
    wanted = (text_name(held_out.text_name), len(held_out), held_out.length)
    return measured is not None and wanted == (text_name(measured.text), measured.windows, measured.window_length)
