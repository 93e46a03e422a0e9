"""What a request is carried out on: an opened model and windows of token ids, wherever they are from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from ghostssm.checkpoint.loading import Checkpoint
from ghostssm.checkpoint.streamed import StreamedCheckpoint
from ghostssm.text.windows import Windows

AnyCheckpoint = TypeVar("AnyCheckpoint", Checkpoint, StreamedCheckpoint)


@dataclass(frozen=True)
class Inputs(Generic[AnyCheckpoint]):
    """An opened model, in memory or streamed, with the windows to calibrate on and those to measure the loss on."""

    checkpoint: AnyCheckpoint
    calibration: Windows
    held_out: Windows | None = None
