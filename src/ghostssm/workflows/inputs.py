"""What a request is carried out on: an opened model and windows of token ids. And what to tell a person of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from ghostssm.checkpoint.loading import Checkpoint
from ghostssm.checkpoint.streamed import StreamedCheckpoint
from ghostssm.progress import Notify
from ghostssm.text.sources import Text, read_text
from ghostssm.text.windows import Windows, cut_windows, evaluation_windows
from ghostssm.workflows.requests import CalibratingRequest, Request

AnyCheckpoint = TypeVar("AnyCheckpoint", Checkpoint, StreamedCheckpoint)


@dataclass(frozen=True)
class Inputs(Generic[AnyCheckpoint]):
    """An opened model, in memory or streamed, with the windows to calibrate on and those to measure the loss on."""

    checkpoint: AnyCheckpoint
    calibration: Windows
    held_out: Windows | None = None


def windows_of(request: Request, text: str | Text, vocabulary: PreTrainedTokenizerBase) -> Windows:
    """The windows of a text to measure the loss on."""
    text = read_text(text, "evaluation") if isinstance(text, str) else text
    return evaluation_windows(text, vocabulary, request.window_length, request.text_windows)


def calibration_windows(
    request: CalibratingRequest, vocabulary: PreTrainedTokenizerBase, text: Text | None = None
) -> Windows:
    """The windows to calibrate on, from the request's text, or from one that is read already."""
    text = text or read_text(request.calibration, "calibration")
    return cut_windows(text, vocabulary, request.window_length, request.windows, request.seed)


def tell_idle_gpu(notify: Notify, device: str) -> None:
    """Tell that there is a GPU, if the work is about to be done without it."""
    if device == "cpu" and torch.cuda.is_available():
        notify(f"computing on the CPU; --device cuda would take the {torch.cuda.get_device_name()}")


def tell_same_text(notify: Notify, calibration: Windows, evaluation: Windows) -> None:
    """Tell that the loss is measured on the text that the state was cut for, if it is."""
    if calibration.text_fingerprint == evaluation.text_fingerprint:
        notify(f"calibrating and measuring on the same text, {evaluation.text_name}: other text will lose more")
