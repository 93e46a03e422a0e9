"""Files that are there whole or not at all, whatever ends the process or the machine."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor


def write_durably(path: Path, write: Callable[[Path], None]) -> None:
    """Have a file written beside its name, bring it to the disk, and only then give it its name."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    write(unfinished)
    synchronise(unfinished)
    unfinished.replace(path)
    synchronise(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write JSON values, numbers so that they are read back bit by bit."""
    text = json.dumps(value, indent=1) + "\n"

    def write(place: Path) -> None:
        place.write_text(text, encoding="utf-8")

    write_durably(path, write)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file."""
    write_durably(path, lambda place: safetensors.torch.save_file(dict(tensors), place, metadata={"format": "pt"}))


def synchronise(path: Path) -> None:
    """Bring a file's contents, or a folder's list of files, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
