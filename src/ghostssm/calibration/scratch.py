"""The room for tensors that grow with the windows: memory, or memory-mapped files."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ghostssm.errors import OutputError


class Scratch:
    """Tensors in memory, or in files that the system writes out when memory runs short.

    The files have no names once they are mapped, so that nothing is left behind, whatever ends the process.

    Args:
        folder: for the files; None for memory.
    """

    def __init__(self, folder: Path | None = None):
        self._folder = folder
        self._kept: dict[str, Tensor] = {}

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised tensor, on the device or in a file.

        Raises:
            OutputError: the folder can't be written, or the disk is too small.
        """
        if self._folder is None:
            return torch.empty(*shape, dtype=dtype, device=device)
        size = torch.Size(shape).numel()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self._folder, prefix=".ghostssm-")
            try:
                # Without room on the disk a write to the mapped file would end the process.
                _reserve(handle, max(1, size * dtype.itemsize))
                mapped = torch.from_file(name, shared=True, size=size, dtype=dtype)
            finally:
                os.close(handle)
                os.unlink(name)
        except OSError as error:
            raise OutputError(
                f"{self._folder} has no room for {size * dtype.itemsize / 1e9:.1f} GB ({error.strerror or error}); "
                "name another folder with --offload, or take fewer windows."
            ) from error
        return mapped.view(*shape)

    def keep(self, name: str, tensor: Tensor) -> Tensor:
        """Keep a tensor and return it, in a file if there is a folder; the file of a name is used again."""
        if self._folder is None:
            return tensor
        before = self._kept.get(name)
        if before is None or before.shape != tensor.shape or before.dtype != tensor.dtype:
            before = self._kept[name] = self.empty(tensor.shape, tensor.dtype, tensor.device)
        before.copy_(tensor)
        return before


def _reserve(handle: int, size: int) -> None:
    if sys.platform == "linux":
        os.posix_fallocate(handle, 0, size)
    else:
        os.truncate(handle, size)
