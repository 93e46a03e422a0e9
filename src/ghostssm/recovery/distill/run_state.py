"""The state of a distillation on disk, so that a run that was ended can go on: OUTPUT.run.

    run.json            what the run is
    state.safetensors   the student, its best parameters, Adam's moments, the place in the text, and the curve

Each appears whole or not at all.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ghostssm.calibration.processes import Processes
from ghostssm.errors import InputError, OutputError, StorageError
from ghostssm.files import durable
from ghostssm.files.interrupts import Terminated
from ghostssm.files.kept_run import RUN_FILE, open_run
from ghostssm.files.output_folder import destination

_STATE_FILE, _FACTS = "state.safetensors", "facts"


class RunState:
    """Keeps the state of a distillation in a folder that is this process's until the end.

    with RunState(output, identity, minutes=10, resume=True, processes=processes) as keeper:
        distill(..., keeper=keeper)
        ...                 # write the output
        keeper.remove()

    Attributes:
        folder: where the state is.
    """

    def __init__(
        self, output: Path | str, identity: Mapping[str, Any], minutes: float, resume: bool, processes: Processes
    ):
        """
        Args:
            identity: what decides the result. minutes: between two states that are kept.

        Raises:
            OutputError: a run's state is there and ``resume`` is false, or something else.
        """
        self.folder = run_folder_of(output)
        self._identity, self._seconds, self._processes = identity, 60 * minutes, processes
        self._lock: IO[str] | None = None
        self._written = time.monotonic()
        self._is_new = False
        processes.from_first(lambda: self._check(resume))

    def _check(self, resume: bool) -> None:
        if (self.folder / RUN_FILE).exists() and not resume:
            raise OutputError(
                f"{self.folder} holds a distillation that ended early; pass --resume to go on, or remove that folder "
                "to start again."
            )
        if self.folder.exists() and not (self.folder / RUN_FILE).exists():
            raise OutputError(f"{self.folder}, where the run's state would be, holds something else; move it away.")

    def __enter__(self) -> RunState:
        self._processes.from_first(self._open)
        return self

    def _open(self) -> None:
        self._lock, self._is_new = open_run(self.folder, self._identity)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            self._lock.close()
        if self._is_new and isinstance(error, InputError) and not (self.folder / _STATE_FILE).exists():
            self.remove()  # a mistake that showed before any work leaves nothing to go on with
        if isinstance(error, KeyboardInterrupt | Terminated):
            raise type(error)(self.how_to_go_on()) from None

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
            try:
                durable.write_tensors(self.folder / _STATE_FILE, tensors | {_FACTS: noted})
            except (OSError, SafetensorError) as error:
                raise StorageError(f"{self.folder} could not be written: {error}. {self.how_to_go_on()}") from error

        self._processes.from_first(written)
        self._written = time.monotonic()

    def remove(self) -> None:
        """Forget the run."""
        if self._processes.rank == 0:
            shutil.rmtree(self.folder, ignore_errors=True)

    def how_to_go_on(self) -> str:
        """A sentence for a person whose run ended."""
        return f"What was kept last is in {self.folder}: give the same command with --resume to go on."


def run_folder_of(output: Path | str) -> Path:
    """Where the state of a distillation that writes an output is."""
    whole = destination(output).absolute()
    return whole.with_name(f"{whole.name}.run")
