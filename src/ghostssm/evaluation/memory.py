"""Peak memory: of this process, or of what it holds on a GPU."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

_CLEAR_PEAK = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def reset_peak(device: torch.device) -> None:
    """Let the peak start again from what is in use now; in a processor's memory where the system can (Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        _CLEAR_PEAK.write_text("5")
    except OSError:
        return


def peak_bytes(device: torch.device) -> int:
    """The largest memory since the last reset: of tensors on a GPU, else resident; since the start of the process where
    there is no reset."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
