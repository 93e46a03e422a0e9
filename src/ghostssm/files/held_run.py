"""A folder that keeps the state of a run: run.json says what the run is, and one process at a time works on it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, ClassVar, Self

from safetensors import SafetensorError

from ghostssm.errors import InputError, OutputError, StorageError
from ghostssm.files import durable
from ghostssm.files.interrupts import Terminated
from ghostssm.files.outputs import destination

RUN_FILE = "run.json"


def run_folder_of(output: Path | str) -> Path:
    """Where the state of a run that writes an output is."""
    whole = destination(output).absolute()
    return whole.with_name(f"{whole.name}.run")


class HeldRun:
    """The folder of a run. Within the context it is there, with run.json, and other processes are refused.

    At the end of the context it stays, so that the run can go on; a signal's exception then says how. But a new run
    that ends in an InputError before any work leaves no folder.

    Attributes:
        folder: where the state of the run is.
        kept_work: what the folder keeps, for a message.
    """

    kept_work: ClassVar[str] = "What is done"

    def __init__(
        self, output: Path | str, identity: Mapping[str, Any], from_first: Callable[[Callable[[], None]], None]
    ):
        """
        Args:
            identity: what decides the result, by names that users know: JSON values.
            from_first: calls a function on the first of the processes that share the run (`Processes.from_first`).
        """
        self.folder = run_folder_of(output)
        self._identity, self._from_first = dict(identity), from_first
        self._file: IO[str] | None = None
        self._is_new = False

    def __enter__(self) -> Self:
        """
        Raises:
            OutputError: the folder can't be used, is of a run with another identity, or another process works on it.
        """
        self._from_first(self._open)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        if self._is_new and isinstance(error, InputError) and not self.has_work():
            self.remove()
        if isinstance(error, KeyboardInterrupt | Terminated):
            raise type(error)(self.how_to_go_on()) from None

    def has_work(self) -> bool:
        """Whether the folder has anything to go on with."""
        raise NotImplementedError

    def remove(self) -> None:
        """Remove the run's folder; first from its name, so that whoever is killed here leaves no half of it."""
        removed = self.folder.with_name(f".{self.folder.name}.removed")
        shutil.rmtree(removed, ignore_errors=True)  # what a killed run left
        with suppress(OSError):
            self.folder.rename(removed)
        for place in (removed, self.folder):
            shutil.rmtree(place, ignore_errors=True)

    def how_to_go_on(self) -> str:
        """A sentence for a person whose run ended."""
        return f"{self.kept_work} is in {self.folder}: give the same command with --resume to go on."

    @contextmanager
    def told_faults(self) -> Iterator[None]:
        """Within the context the system's errors become one message with the next step."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            place, reason = self.folder, str(error)
            if isinstance(error, OSError):
                place, reason = error.filename or place, error.strerror or reason
            raise StorageError(f"{place} could not be written: {reason}. {self.how_to_go_on()}") from error

    def _open(self) -> None:
        self._is_new = not (self.folder / RUN_FILE).exists()
        try:
            if self._is_new:
                durable.write_durably(self.folder, self._create)
            self._file = (self.folder / RUN_FILE).open(encoding="utf-8")
            self._check(self._file)
        except (OSError, ValueError) as error:
            self._close()
            raise OutputError(f"The run's folder {self.folder} can't be used: {error}.") from error
        except OutputError:
            self._close()
            raise

    def _create(self, place: Path) -> None:
        place.mkdir(parents=True)
        durable.write_json(place / RUN_FILE, self._identity)

    def _check(self, file: IO[str]) -> None:
        if sys.platform != "win32":
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OutputError(f"Another process works on the run in {self.folder}; wait for its end.") from None
        kept = json.load(file)
        for field in (*self._identity, *kept):
            before, now = kept.get(field), self._identity.get(field)
            if before != now:
                raise OutputError(
                    f"{self.folder} holds a run that differs in {field}: it was {before!r}, now it is {now!r}. Go on "
                    "with the same model, text, options and versions, or remove that folder to start again."
                )

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
