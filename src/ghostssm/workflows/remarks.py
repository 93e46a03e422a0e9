"""What a person should know before the work, whichever use case it belongs to."""

from __future__ import annotations

import torch

from ghostssm.progress import Notify
from ghostssm.text.windows import Windows


def idle_gpu_remark(device: str) -> str | None:
    """That a GPU is there, where the work is about to be done without it."""
    if device != "cpu" or not torch.cuda.is_available():
        return None
    return f"computing on the CPU; --device cuda would take the {torch.cuda.get_device_name()}"


def same_text_remark(calibration: Windows, evaluation: Windows) -> str | None:
    """That the loss is measured on what the state was cut for."""
    if calibration.text_fingerprint != evaluation.text_fingerprint:
        return None
    return f"calibrating and measuring on the same text, {evaluation.text_name}: other text will lose more"


def tell(notify: Notify, remark: str | None) -> None:
    """Tell a remark, if there is one."""
    if remark is not None:
        notify(remark)
