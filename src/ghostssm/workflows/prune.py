"""Prune a model: from a request to a written checkpoint, in memory or one block at a time."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

from ghostssm.calibration.processes import Processes, own_device
from ghostssm.checkpoint.dry_run import dry_run
from ghostssm.checkpoint.hub import push_to_hub
from ghostssm.checkpoint.loading import Checkpoint, load
from ghostssm.checkpoint.saving import save
from ghostssm.checkpoint.streamed import StreamedCheckpoint, stream
from ghostssm.checkpoint.tokenizer import renamed_class
from ghostssm.errors import IncompleteError
from ghostssm.evaluation.perplexity import Evaluation, evaluate_in_float32, measurement_of
from ghostssm.files.outputs import OutputFolder
from ghostssm.models.families import layout_of
from ghostssm.ops.state_format import FLOAT32
from ghostssm.plan.measurement import Compared
from ghostssm.plan.plan import Plan
from ghostssm.plan.surgery import apply_plan
from ghostssm.progress import Notify, Progress, silent, unheard
from ghostssm.streaming.run import finished_run, may_be_finished, prune_streamed
from ghostssm.streaming.run_folder import check_run_folder
from ghostssm.text.windows import Windows
from ghostssm.workflows.inputs import Inputs, tell_idle_gpu
from ghostssm.workflows.prune_checks import DEFAULT_BATCHES, PruneJob, PruneOutcome, checked
from ghostssm.workflows.prune_plans import Planner, compared
from ghostssm.workflows.report_measuring import decode_speeds, observe, sample
from ghostssm.workflows.report_record import Record, WindowLosses
from ghostssm.workflows.request_checks import check_places
from ghostssm.workflows.requests import PruneRequest


def prune(request: PruneRequest, *, progress: Progress = silent, notify: Notify = unheard) -> PruneOutcome:
    """Carry a request out: what ``ghostssm prune`` does.

    Args:
        progress: told how far the work is. notify: told what a person should know, in sentences.

    Raises:
        InputError: a fault of the request or of what it names, found before anything is loaded where it can be.
        NumericalError: numbers that are not finite, or that the stored dtype can't hold; names the layer.
        StorageError: writing failed; nothing half-written is left, and what a streamed run has done can be resumed.
        IncompleteError: the checkpoint is written, but something is missing beside its weights.
        HubError: the upload failed; what was to be uploaded is on the disk.
    """
    check_places(request)
    folder = None
    if request.output is not None and not request.stream:
        folder = OutputFolder(request.output, request.overwrite)
    job = checked(request, notify)
    tell_idle_gpu(notify, request.device)
    if request.stream:
        outcome, is_first = _streamed(job, progress, notify)
        return _uploaded(outcome, request) if is_first else outcome
    checkpoint = load(request.model, device=request.device, tokenizer=request.tokenizer)
    return prune_on(job, job.inputs(checkpoint), folder, progress, notify)


def _uploaded(outcome: PruneOutcome, request: PruneRequest) -> PruneOutcome:
    """Upload the checkpoint, if that was asked for; the outcome then has its address."""
    if request.push_to_hub is None or outcome.written is None:
        return outcome
    address = push_to_hub(outcome.written, request.push_to_hub, private=request.private is not False)
    return dataclasses.replace(outcome, address=address)


def prune_on(
    job: PruneJob, inputs: Inputs[Checkpoint], folder: OutputFolder | None, progress: Progress, notify: Notify
) -> PruneOutcome:
    """Prune a model in memory; what the request says of model and texts is not read.

    The given model is changed, where the stock class can express the result.

    Args:
        folder: to write the result into, if it is to be written.
    """
    asked = job.request
    checkpoint, windows, held_out = inputs.checkpoint, inputs.calibration, inputs.held_out
    if folder is not None:
        dry_run(checkpoint, folder, asked.dialect, asked.untie)
    job.announce(inputs, notify)
    dense = None if held_out is None else evaluate_in_float32(checkpoint.model, held_out, progress)
    plan, baselines = _planned(job, inputs, dense, progress, notify)
    record = _observed(job, checkpoint, windows, held_out, plan, progress) if asked.report else Record()
    layout = layout_of(checkpoint.model.config)
    smaller = dataclasses.replace(checkpoint, model=apply_plan(checkpoint.model, plan))
    measured = None
    if held_out is not None and dense is not None:
        after = evaluate_in_float32(smaller.model, held_out, progress, plan.state_dtype or FLOAT32.name)
        measured = measurement_of(held_out, dense, after)
        if baselines:
            own = compared(plan, layout, measured.excess)
            measured = dataclasses.replace(measured, compared=(own, *baselines))
        losses = WindowLosses.of(held_out, dense, {"pruned": after})
        record = dataclasses.replace(record, losses=losses, state_dtype=plan.state_dtype or FLOAT32.name)
    outcome = PruneOutcome(None, plan, measured, checkpoint=smaller)
    if folder is None:
        return outcome
    try:
        written = save(
            smaller, plan, folder, dialect=asked.dialect, untie=asked.untie, measured=measured, request=asked.as_json()
        )
    except IncompleteError as error:
        record.write(error.folder)
        raise
    _tell_renamed_class(checkpoint, written, notify)
    record.write(written)
    return _uploaded(dataclasses.replace(outcome, written=written), asked)


def _planned(
    job: PruneJob, inputs: Inputs[Checkpoint], dense: Evaluation | None, progress: Progress, notify: Notify
) -> tuple[Plan, tuple[Compared, ...]]:
    """The plan that was asked for, and what the baselines beside it lose."""
    planner = Planner(job, inputs.checkpoint.model, inputs.calibration, progress)
    plan = planner.asked_for()
    if inputs.held_out is None or dense is None:
        return plan, ()
    return plan, planner.baselines(plan, inputs.held_out, dense, notify)


def _observed(
    job: PruneJob, checkpoint: Checkpoint, windows: Windows, held_out: Windows | None, plan: Plan, progress: Progress
) -> Record:
    """What a report shows besides the plan, measured before the plan is applied to the model."""
    observations = observe(checkpoint.model, windows, progress)
    batches = job.request.batches or DEFAULT_BATCHES
    speeds = decode_speeds(checkpoint.model, job.description, plan, batches, progress)
    samples = None if held_out is None else sample(checkpoint, {"pruned": plan}, held_out)
    return Record(observations, decode=speeds, samples=samples, state_dtype=plan.state_dtype or FLOAT32.name)


def _keep_observed(
    checkpoint: StreamedCheckpoint,
    inputs: Inputs[StreamedCheckpoint],
    state_dtype: str | None,
    progress: Progress,
    dense: Evaluation | None,
    after: Evaluation | None,
    folder: Path,
) -> None:
    """Write into a folder what a report shows, as far as it can be measured with one block in memory at a time."""
    losses = None
    if inputs.held_out is not None and dense is not None and after is not None:
        losses = WindowLosses.of(inputs.held_out, dense, {"pruned": after})
    observations = observe(checkpoint.blocks, inputs.calibration, progress)
    Record(observations, losses, state_dtype=state_dtype or FLOAT32.name).write(folder)


def _tell_renamed_class(checkpoint: Checkpoint | StreamedCheckpoint, written: Path, notify: Notify) -> None:
    """Tell it if the written tokenizer_config.json names another class than the base model's does."""
    if renamed := renamed_class(checkpoint.tokenizer, written):
        notify(f"note: {renamed}")


def _streamed(job: PruneJob, progress: Progress, notify: Notify) -> tuple[PruneOutcome, bool]:
    """Carry out this process's share of a streamed run; what is done is kept in OUTPUT.run until the end.

    Returns:
        the outcome, and whether this is the first of the processes that share the run.
    """
    asked, size = job.request, job.target.size
    assert size is not None
    assert asked.output is not None
    device = own_device(asked.device)
    processes = Processes.join(device)
    output = Path(asked.output)

    def check_output() -> None:
        processes.from_first(lambda: check_run_folder(output, resume=asked.resume, overwrite=asked.overwrite))

    finished = asked.resume and processes.from_first(lambda: may_be_finished(output))
    if not finished:
        check_output()
    checkpoint = stream(asked.model, device=device, tokenizer=asked.tokenizer, head=False)
    inputs = job.inputs(checkpoint)
    if finished:
        base = processes.from_first(checkpoint.source.fingerprint)
        run = finished_run(output, base, asked.as_json(), inputs.calibration, inputs.held_out)
        if run is not None:
            notify(f"{output} is finished: this run wrote it before")
            processes.leave()
            return PruneOutcome(output, run.plan, run.measured), processes.rank == 0
        check_output()
    job.announce(inputs, notify)
    run = prune_streamed(
        checkpoint,
        inputs.calibration,
        job.recipe,
        size,
        output,
        groups=asked.groups,
        seed=asked.seed,
        multiple=job.multiple,
        overwrite=asked.overwrite,
        resume=asked.resume,
        dialect=asked.dialect,
        untie=asked.untie,
        state_dtype=asked.state_dtype,
        offload=asked.offload,
        held_out=inputs.held_out,
        processes=processes,
        request=asked.as_json(),
        beside=partial(_keep_observed, checkpoint, inputs, asked.state_dtype, progress) if asked.report else None,
        progress=progress,
    )
    processes.leave()
    _tell_renamed_class(checkpoint, output, notify)
    return PruneOutcome(output, run.plan, run.measured), processes.rank == 0
