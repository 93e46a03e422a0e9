"""What a request is carried out on: an opened model and windows of token ids, wherever they are from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from transformers import PreTrainedTokenizerBase

from ghostssm.checkpoint.loading import Checkpoint
from ghostssm.checkpoint.streamed import StreamedCheckpoint
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
    """The windows to calibrate on, of the text if it is read already."""
    text = text or read_text(request.calibration, "calibration")
    return cut_windows(text, vocabulary, request.window_length, request.windows, request.seed)
