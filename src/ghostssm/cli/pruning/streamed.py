"""``ghostssm prune --stream``: one block of weights at a time, alone or shared by several processes."""

from __future__ import annotations

import os
from pathlib import Path

import ghostssm
from ghostssm.calibration.processes import Processes, own_device
from ghostssm.checkpoint.dialects import dialect_named
from ghostssm.cli.console import note, progress_reporter
from ghostssm.cli.pruning.finished import finished_outcome, may_be_finished
from ghostssm.cli.pruning.job import Job
from ghostssm.cli.pruning.outcome import Outcome, note_renamed_class
from ghostssm.errors import InputError
from ghostssm.pruning.feasibility import check_streamable
from ghostssm.streaming.run_folder import check_run_folder


def check_not_shared() -> None:
    """Raise InputError if this is one of several processes, which only a streamed run knows how to use."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise InputError("Several processes share a run with --stream only; add that, or start one process.")


def check_streamed_options(dialect: str, max_excess_loss: float | None, untie: bool, report: bool) -> None:
    """Raise InputError for what needs the whole model at once."""
    if not dialect_named(dialect).is_streamed:
        raise InputError(
            f"The {dialect} dialect has all weights in one file, which --stream can't write; expected the transformers "
            "dialect."
        )
    for option, given in (("--untie", untie), ("--report", report)):
        if given:
            raise InputError(f"{option} needs the whole model in memory, which --stream avoids; leave out one of them.")
    if max_excess_loss is not None:
        raise InputError(
            "--max-excess-loss tries several sizes on the whole model, which --stream can't; give --state-size or "
            "--budget."
        )


def prune_streamed(job: Job, resume: bool, offload: Path | None) -> Outcome:
    """Carry a job out in this process's share of a run; what is done is in OUTPUT.run until the end."""
    assert job.target.size is not None
    device = own_device(job.device)
    processes = Processes.join(device)
    output = Path(job.output)

    def check_output() -> None:
        processes.from_first(lambda: check_run_folder(output, resume=resume, overwrite=job.overwrite))

    finished = resume and processes.from_first(lambda: may_be_finished(output))
    if not finished:
        check_output()
    check_streamable(job.recipe, job.description.family)
    checkpoint = ghostssm.stream(job.model, device=device, tokenizer=job.tokenizer, head=False)
    vocabulary = checkpoint.require_tokenizer()
    held_out = job.held_out(vocabulary)
    windows = job.windows(vocabulary)
    if finished:
        outcome = finished_outcome(job, processes.from_first(checkpoint.source.fingerprint), windows, held_out)
        if outcome is not None:
            note(f"{output} is finished: this run wrote it before")
            processes.leave()
            return outcome
        check_output()
    job.announce(windows, held_out)
    with progress_reporter() as progress:
        run = ghostssm.prune_streamed(
            checkpoint,
            windows,
            job.recipe,
            job.target.size,
            output,
            groups=job.groups,
            seed=job.seed,
            overwrite=job.overwrite,
            resume=resume,
            offload=offload,
            held_out=held_out,
            processes=processes,
            progress=progress,
        )
    processes.leave()
    note_renamed_class(checkpoint, output)
    return Outcome(output, run.plan, run.measured)
