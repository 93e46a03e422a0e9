"""Distil a pruned checkpoint: from a request to a written checkpoint, on one process or several."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from ghostssm._version import __version__
from ghostssm.calibration.processes import Processes, own_device
from ghostssm.checkpoint.description import chosen_state_dtype
from ghostssm.checkpoint.exporting import export_checkpoint
from ghostssm.checkpoint.loading import Checkpoint, load
from ghostssm.checkpoint.manifest import Manifest
from ghostssm.checkpoint.source import Source
from ghostssm.evaluation.perplexity import Evaluation, evaluate_in_float32, measurement_of
from ghostssm.files.outputs import OutputFolder
from ghostssm.ops.state_format import FLOAT32
from ghostssm.plan.distillation import Distillation
from ghostssm.plan.measurement import Measurement
from ghostssm.plan.surgery import change_parameters
from ghostssm.progress import Notify, Progress, silent, unheard
from ghostssm.recovery.distill.batches import Batches
from ghostssm.recovery.distill.run_state import RunState
from ghostssm.recovery.distill.training import Distilled, Listener
from ghostssm.recovery.distill.training import distill as train
from ghostssm.text.sources import read_text
from ghostssm.text.streams import StreamedText
from ghostssm.text.windows import Windows, evaluation_windows
from ghostssm.workflows.distill_checks import check_room, check_tokenizers, checked, rounded_to, settings
from ghostssm.workflows.inputs import tell_idle_gpu
from ghostssm.workflows.requests import DistillRequest

_TOLD_OVERLAP = 0.02
"""Licences and the like stand in many texts."""


@dataclasses.dataclass(frozen=True)
class DistillOutcome:
    """What became of a request.

    Attributes:
        written: the checkpoint's folder.
        distillation: what was done, and what it gave.
    """

    written: Path
    distillation: Distillation


def distill(request: DistillRequest, *, progress: Progress = silent, notify: Notify = unheard) -> DistillOutcome:
    """Carry a request out: what ``ghostssm distill`` does, in one call. Several processes each make this call.

    Args:
        request: student, teacher, text and output.
        progress: told how far the work is.
        notify: told what a person should know, in sentences.

    Raises:
        InputError: a fault of the request or of what it names, found before the training where it can be.
        StorageError: writing failed; what was kept can be resumed.
        IncompleteError: the checkpoint is written, but something is missing beside its weights.
    """
    described = checked(request)
    request = dataclasses.replace(request, state_dtype=rounded_to(request, described[0]))
    tell_idle_gpu(notify, request.device)
    request = dataclasses.replace(request, device=own_device(request.device))
    processes = Processes.join(request.device)
    check_room(request, *described, processes.size)
    job = _Job(request, processes, progress, notify)
    outcome = processes.from_first(job.finished) or job.run()
    processes.leave()
    return outcome


class _Job:
    """A checked request, being carried out by one of its processes."""

    def __init__(self, request: DistillRequest, processes: Processes, progress: Progress, notify: Notify):
        self.asked, self.processes, self.progress, self.notify = request, processes, progress, notify

    def finished(self) -> DistillOutcome | None:
        """The outcome of a run that is to be resumed and has come to its end; None of any other."""
        output = Path(self.asked.output)
        if not self.asked.resume or not Manifest.is_in(output):
            return None
        manifest = Manifest.read(output)
        if manifest.request != self.asked.as_json() or not manifest.distillations:
            return None
        self.notify(f"{output} is finished: this run wrote it before")
        return DistillOutcome(output, manifest.distillations[-1])

    def run(self) -> DistillOutcome:
        asked, processes = self.asked, self.processes
        folder = processes.from_first(lambda: OutputFolder(asked.output, asked.overwrite))
        # Sharding moves block by block to the device, which has no room for two whole models then.
        first_device = "cpu" if processes.size > 1 else asked.device
        checkpoint = load(asked.student, dtype=torch.float32, device=first_device, tokenizer=asked.tokenizer)
        dense = load(
            asked.teacher,
            dtype=torch.bfloat16 if asked.bfloat16 else torch.float32,
            device="cpu" if processes.size > 1 else asked.teacher_device or asked.device,
            tokenizer=asked.tokenizer,
        )
        vocabulary = checkpoint.require_tokenizer()
        check_tokenizers(vocabulary, dense.tokenizer)
        texts = [
            evaluation_windows(read_text(text, "evaluation"), vocabulary, asked.window_length, asked.text_windows)
            for text in asked.evaluate
        ]
        stream = StreamedText(asked.text, vocabulary, asked.window_length)
        batches = Batches(stream, asked.batch, asked.seed, [text.ids for text in texts])
        identity = _identity(asked, checkpoint.source, dense.source, batches, processes.size)
        keeper = RunState(asked.output, identity, asked.save_minutes, asked.resume, processes)
        self.notify(
            f"distilling on {batches.source.name}: {asked.steps} steps of {asked.batch} windows of "
            f"{asked.window_length} tokens; {len(batches.held_out)} windows are held out"
            f"{'' if asked.state_dtype == FLOAT32.name else f'; the state is rounded to {asked.state_dtype}'}"
        )
        with keeper:
            wanted = [evaluate_in_float32(dense.model, text, self.progress) for text in texts]
            before = self._measured(checkpoint, texts, wanted)
            distilled = self._trained(checkpoint, dense, batches, keeper)
            outcome = processes.from_first(lambda: self._written(distilled, texts, wanted, before, folder))
            keeper.remove()
        return outcome

    def _trained(self, checkpoint: Checkpoint, dense: Checkpoint, batches: Batches, keeper: RunState) -> Distilled:
        asked = self.asked
        with _tracked(asked, self.processes.rank == 0) as log:
            return train(
                checkpoint.model,
                dense.model,
                batches,
                settings(asked),
                teacher_name=dense.source.published_name,
                processes=self.processes,
                listener=Listener(self.progress, self.notify, log),
                keeper=keeper,
            )

    def _written(
        self,
        distilled: Distilled,
        texts: Sequence[Windows],
        wanted: Sequence[Evaluation],
        before: Sequence[Measurement],
        folder: OutputFolder,
    ) -> DistillOutcome:
        """Write the student, as it is stored, with its new parameters."""
        asked = self.asked
        checkpoint = load(asked.student, tokenizer=asked.tokenizer)
        change_parameters(checkpoint.model, distilled.changes)
        checkpoint.model.tie_weights()
        after = self._measured(checkpoint, texts, wanted)
        if (overlap := distilled.record.overlap) is not None and overlap > _TOLD_OVERLAP:
            self.notify(
                f"{overlap:.0%} of the text to measure on was also trained on; the loss on other text may be larger"
            )
        record = dataclasses.replace(distilled.record, before=tuple(before), after=tuple(after))
        written = export_checkpoint(
            checkpoint,
            folder,
            dialect=checkpoint.source.dialect,
            distilled=record,
            measured=after[0] if after else None,
            request=asked.as_json(),
        )
        return DistillOutcome(written, record)

    def _measured(
        self, checkpoint: Checkpoint, texts: Sequence[Windows], wanted: Sequence[Evaluation]
    ) -> list[Measurement]:
        rounded = self.asked.state_dtype
        state_dtype = chosen_state_dtype(checkpoint.source) if rounded in (None, FLOAT32.name) else rounded
        losses = [evaluate_in_float32(checkpoint.model, text, self.progress, state_dtype) for text in texts]
        return [measurement_of(*each) for each in zip(texts, wanted, losses, strict=True)]


def _identity(
    asked: DistillRequest, student: Source, teacher: Source, batches: Batches, processes: int
) -> dict[str, Any]:
    """What decides the numbers of a run."""
    return asked.as_json() | {
        "ghostssm": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "student's weights": student.fingerprint(),
        "teacher's weights": teacher.fingerprint(),
        "held-out windows": hashlib.sha256(batches.held_out.numpy().tobytes()).hexdigest(),
        "processes": processes,
    }


@contextmanager
def _tracked(asked: DistillRequest, is_first: bool) -> Iterator[Callable[[dict[str, float], int], None]]:
    """Within the context the first process sends numbers to the tracker that was asked for."""
    if asked.log_to is None or not is_first:
        yield lambda numbers, step: None
        return
    from accelerate import Accelerator

    accelerator = Accelerator(log_with=asked.log_to, project_dir=f"{Path(asked.output)}.log")
    accelerator.init_trackers("ghostssm-distill", config={"steps": asked.steps})
    try:
        yield lambda numbers, step: accelerator.log(numbers, step=step)
    finally:
        accelerator.end_training()
