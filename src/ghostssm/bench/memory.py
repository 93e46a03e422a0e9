"""Peak memory of this process."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

_CLEAR_PEAK = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def reset_peak() -> None:
    """Let the peak start again from what is in use now, where the system can (Linux)."""
    try:
        _CLEAR_PEAK.write_text("5")
    except OSError:
        return


def peak_bytes() -> int:
    """The largest resident memory since the last reset; since the start of the process where there is no reset."""
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
