"""The state of a distillation on disk, so that a run that was ended can go on: OUTPUT.run.

    run.json            what the run is
    state.safetensors   the student, its best parameters, Adam's moments, the place in the text, and the curve

Each appears whole or not at all.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ghostssm.calibration.processes import Processes
from ghostssm.errors import OutputError
from ghostssm.files import durable
from ghostssm.files.held_run import RUN_FILE, HeldRun

_STATE_FILE, _FACTS = "state.safetensors", "facts"


class RunState(HeldRun):
    """Keeps the state of a distillation in a folder that is this process's until the end.

    with RunState(output, identity, minutes=10, resume=True, processes=processes) as keeper:
        distill(..., keeper=keeper)
        ...                 # write the output
        keeper.remove()

    Attributes:
        folder: where the state is.
    """

    kept_work = "What was kept last"

    def __init__(
        self, output: Path | str, identity: Mapping[str, Any], minutes: float, resume: bool, processes: Processes
    ):
        """
        Args:
            identity: what decides the result. minutes: between two states that are kept.

        Raises:
            OutputError: a run's state is there and ``resume`` is false, or something else.
        """
        super().__init__(output, identity, processes.from_first)
        self._seconds, self._processes = 60 * minutes, processes
        self._written = time.monotonic()
        processes.from_first(lambda: self._check_resumed(resume))

    def _check_resumed(self, resume: bool) -> None:
        if (self.folder / RUN_FILE).exists() and not resume:
            raise OutputError(
                f"{self.folder} holds a distillation that ended early; pass --resume to go on, or remove that folder "
                "to start again."
            )
        if self.folder.exists() and not (self.folder / RUN_FILE).exists():
            raise OutputError(f"{self.folder}, where the run's state would be, holds something else; move it away.")

    def has_work(self) -> bool:
        return (self.folder / _STATE_FILE).exists()

    def is_due(self) -> bool:
        """Whether so many minutes have gone since a state was kept."""
        return time.monotonic() - self._written >= self._seconds

    def read(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """The state that was kept last, as every process reads it; None if there is none."""
        file = self.folder / _STATE_FILE
        if not self._processes.from_first(file.exists):
            return None
        try:
            tensors = safetensors.torch.load(file.read_bytes())
            facts = json.loads(bytes(tensors.pop(_FACTS).tolist()))
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise OutputError(f"{file} is damaged ({error}); remove {self.folder} to start again.") from error
        return facts, tensors

    def write(self, facts: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Keep a state in place of the one before; the first process writes.

        Raises:
            StorageError: the disk failed; the state before is still there.
        """

        def written() -> None:
            noted = torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8)
            with self.told_faults():
                durable.write_tensors(self.folder / _STATE_FILE, tensors | {_FACTS: noted})

        self._processes.from_first(written)
        self._written = time.monotonic()

    def remove(self) -> None:
        """Forget the run."""
        if self._processes.rank == 0:
            super().remove()
