"""Files that are there whole or not at all, whatever ends the process or the machine."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def write_durably(path: Path, write: Callable[[Path], None]) -> None:
    """Have a file written beside its name, bring it to the disk, and only then give it its name."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    write(unfinished)
    synchronise(unfinished)
    unfinished.replace(path)
    synchronise(path.parent)


def synchronise(path: Path) -> None:
    """Bring a file's contents, or a folder's list of files, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
