"""What a walk over a streamed model finds, kept on disk, so that a walk that was ended can go on."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ghostssm.calibration.processes import Processes
from ghostssm.errors import OutputError
from ghostssm.files import durable
from ghostssm.pruning.journal import Findings

_ROWS_AT_ONCE = 8
"""Windows of hidden states that are copied from or to the disk together."""


class FindingsOnDisk(Findings):
    """Findings in ``PART/00007.json`` and hidden states in ``hidden/PART-00008-0.bin`` of a run's folder.

    A finding is written last: where it is, all before it is on the disk. Hidden states are kept for the last finding
    only, and not at all once every block has one.
    """

    def __init__(
        self, folder: Path, part: str, processes: Processes, told_faults: Callable[[], AbstractContextManager[None]]
    ):
        """
        Args:
            processes: that share the walk; the first writes all but the others' hidden states.
            told_faults: within its context the system's errors become those of the run.
        """
        super().__init__()
        self._folder, self._part, self._processes, self._told_faults = folder, part, processes, told_faults
        self._blocks = 0

    def read(self, blocks: int, take_over: Callable[[Any], None] = lambda finding: None) -> None:
        """Read what earlier runs found of so many blocks.

        Args:
            take_over: called with each finding; what it raises for a damaged one is told.

        Raises:
            OutputError: a finding is damaged.
        """
        self._blocks = blocks
        self.entries = self._processes.from_first(self._read)
        for index, finding in enumerate(self.entries):
            try:
                take_over(finding)
            except (ValueError, KeyError, TypeError) as error:
                raise self._damaged(index, error) from error

    def _read(self) -> list[Any]:
        with self._told_faults():
            for place in (self._part, "hidden"):
                (self._folder / place).mkdir(exist_ok=True)
        findings: list[Any] = []
        while (file := self._file(len(findings))).exists():
            try:
                findings.append(json.loads(file.read_text(encoding="utf-8")))
            except ValueError as error:
                raise self._damaged(len(findings), error) from error
        return findings

    def restore(self, hidden: Tensor) -> None:
        if not self.entries or len(self.entries) == self._blocks:
            return
        file = self._hidden_file(len(self.entries))
        try:
            with torch.inference_mode(), file.open("rb") as stream:
                for rows in hidden.split(_ROWS_AT_ONCE):
                    values = np.fromfile(stream, dtype=_numpy_dtype(hidden), count=rows.numel())
                    rows.copy_(torch.from_numpy(values).view(rows.shape))
        except (OSError, ValueError, RuntimeError) as error:
            raise OutputError(f"{file} can't be read ({error}); remove {self._folder} to start again.") from error

    def add(self, finding: Any, hidden: Tensor | None = None) -> None:
        number = len(self.entries)
        if hidden is not None and number + 1 < self._blocks:
            with self._told_faults():
                durable.write_durably(self._hidden_file(number + 1), partial(_write_rows, hidden))
        self._processes.gather([None])  # all hidden states are on the disk
        self._processes.from_first(partial(self._write, number, finding))
        self._hidden_file(number).unlink(missing_ok=True)
        super().add(finding, hidden)

    def _write(self, number: int, finding: Any) -> None:
        with self._told_faults():
            durable.write_json(self._file(number), finding)

    def _damaged(self, index: int, error: Exception) -> OutputError:
        return OutputError(f"{self._file(index)} is damaged ({error}); remove {self._folder} to start again.")

    def _file(self, index: int) -> Path:
        return self._folder / self._part / f"{index:05d}.json"

    def _hidden_file(self, index: int) -> Path:
        return self._folder / "hidden" / f"{self._part}-{index:05d}-{self._processes.rank}.bin"


def _write_rows(hidden: Tensor, path: Path) -> None:
    with path.open("wb") as file:
        for rows in hidden.split(_ROWS_AT_ONCE):
            rows.cpu().numpy().tofile(file)


def _numpy_dtype(tensor: Tensor) -> Any:
    return torch.empty(0, dtype=tensor.dtype).numpy().dtype
