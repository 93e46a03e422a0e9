"""``ghostssm prune`` with the whole model in memory, and what can be measured of it then."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import ghostssm
from ghostssm.checkpoint.manifest import PAGE_FILE
from ghostssm.checkpoint.rehearsal import rehearse_save
from ghostssm.cli.console import progress_reporter
from ghostssm.cli.pruning.job import Job
from ghostssm.cli.pruning.outcome import Outcome, note_renamed_class
from ghostssm.cli.report import write_page
from ghostssm.errors import IncompleteError
from ghostssm.evaluation.measurement import evaluate_in_float32, measurement_of
from ghostssm.files.output_file import OutputFile
from ghostssm.files.output_folder import OutputFolder
from ghostssm.report.measuring import decode_speeds, observe
from ghostssm.report.record import Record, WindowLosses


def prune_in_memory(
    job: Job,
    folder: OutputFolder,
    dialect: str,
    *,
    untie: bool,
    report_batches: Sequence[int],
) -> Outcome:
    """Carry a job out.

    Args:
        report_batches: batch sizes that a report shows the decode speed of; no report if there are none.
    """
    checkpoint = ghostssm.load(job.model, device=job.device, tokenizer=job.tokenizer)
    vocabulary = checkpoint.require_tokenizer()
    rehearse_save(checkpoint, folder, dialect, untie)
    held_out = job.held_out(vocabulary)
    dense = None if held_out is None else _evaluated(checkpoint, held_out)
    windows = job.windows(vocabulary)
    job.announce(windows, held_out)
    plan = _decide(job, checkpoint, windows)
    record = _recorded(job, checkpoint, windows, plan, report_batches) if report_batches else Record()
    smaller = dataclasses.replace(checkpoint, model=ghostssm.apply_plan(checkpoint.model, plan))
    measured = None
    if held_out is not None and dense is not None:
        after = _evaluated(smaller, held_out)
        measured = measurement_of(held_out, dense, after)
        record = dataclasses.replace(record, losses=WindowLosses.of(held_out, dense, {"pruned": after}))
    try:
        written = ghostssm.save(smaller, plan, folder, dialect=dialect, untie=untie, measured=measured)
    except IncompleteError as error:
        _write(record, error.folder)
        raise
    note_renamed_class(checkpoint, written)
    _write(record, written)
    return Outcome(written, plan, measured, _page(written) if report_batches else None)


def _evaluated(checkpoint: ghostssm.Checkpoint, windows: ghostssm.Windows) -> ghostssm.Evaluation:
    with progress_reporter() as progress:
        return evaluate_in_float32(checkpoint.model, windows, progress)


def _decide(job: Job, checkpoint: ghostssm.Checkpoint, windows: ghostssm.Windows) -> ghostssm.Plan:
    target = job.target
    with progress_reporter() as progress:
        if target.size is not None:
            calibration = ghostssm.Calibration(checkpoint.model, windows)
            return calibration.plan(job.recipe, target.size, job.groups, job.seed, progress, job.multiple)
        assert target.max_excess_loss is not None
        return ghostssm.smallest_plan(
            checkpoint.model,
            windows,
            job.recipe,
            target.max_excess_loss,
            multiple=job.multiple,
            state_sizes=target.sizes,
            groups=job.groups,
            seed=job.seed,
            progress=progress,
        )


def _recorded(
    job: Job,
    checkpoint: ghostssm.Checkpoint,
    windows: ghostssm.Windows,
    plan: ghostssm.Plan,
    batches: Sequence[int],
) -> Record:
    """What a report shows besides the plan, of the model before the plan is applied to it."""
    with progress_reporter() as progress:
        observations = observe(checkpoint.model, windows, progress)
        decode = decode_speeds(checkpoint.model, job.description, plan, batches, progress)
    return Record(observations, decode=decode)


def _write(record: Record, folder: Path) -> None:
    if record != Record():
        record.write(folder)


def _page(folder: Path) -> Path:
    from ghostssm.report.building import checkpoint_report  # with its libraries, which only a report needs

    page = folder / PAGE_FILE
    write_page(OutputFile(page), checkpoint_report(folder))
    return page
