"""A folder that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from safetensors import SafetensorError

from ghostssm.errors import OutputError, StorageError
from ghostssm.interrupts import uninterrupted


class OutputFolder:
    """A folder that appears whole or not at all.

    Opened before the work, so that a folder that may not be written is refused at once:

        with OutputFolder(path) as folder:
            ...                 # write into folder.partial
            folder.commit()
    """

    def __init__(self, path: Path | str, overwrite: bool = False):
        """
        Raises:
            OutputError: the path is a file, a folder with something in it (unless ``overwrite``), or not writable.
        """
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise OutputError(f"{self.path} is a file; expected a folder to write.")
        if self.path.is_dir() and any(self.path.iterdir()) and not overwrite:
            raise OutputError(f"{self.path} exists and is not empty; name another folder, or pass --overwrite.")
        absolute = self.path.absolute()
        self._new_parents = [parent for parent in absolute.parents if not parent.exists()]
        place = absolute.parents[len(self._new_parents)]
        if place.is_dir() and not os.access(place, os.W_OK | os.X_OK):
            raise OutputError(f"{self.path} can't be written: {place} is read-only; name another folder.")
        self.partial = absolute.with_name(f".{absolute.name}.partial-{os.getpid()}")
        self._old = self.partial.with_name(self.partial.name + ".old")

    def __enter__(self) -> OutputFolder:
        try:
            self.partial.mkdir(parents=True)
        except OSError as error:
            raise OutputError(f"{self.path} can't be written: {error.strerror or error}.") from error
        return self

    def commit(self) -> None:
        """Put the finished folder in its place; an old one goes only once the new one stands and is on the disk."""
        umask = os.umask(0)
        os.umask(umask)
        for file in self.partial.rglob("*"):
            if file.is_file():
                file.chmod(0o666 & ~umask)  # some writers leave files that only their owner can read
            _flush(file)
        with uninterrupted():
            if self.path.exists():
                self.path.rename(self._old)
            self.partial.rename(self.path)
        _flush(self.path.absolute().parent)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with uninterrupted():
            if self._old.exists() and not self.path.exists():
                self._old.rename(self.path)
            for folder in (self.partial, self._old):
                shutil.rmtree(folder, ignore_errors=True)
            for parent in self._new_parents:
                with suppress(OSError):  # not empty: the output is there
                    parent.rmdir()


def _flush(path: Path) -> None:
    """Have the disk hold what was written; also where a disk that is full says so late."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def storing(path: Path) -> Iterator[None]:
    """Within the context a failure to write what becomes ``path`` is a StorageError."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = _write_failure(error)
        if reason is None:
            raise
        raise StorageError(f"{path} could not be written: {reason}. Nothing was kept.") from error


def _write_failure(error: Exception) -> str | None:
    """What kept a file from being written; None if the error is of another kind."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, SafetensorError):
        return str(error)
    # torch.save has no class of its own for it, and has lost the reason.
    return "torch.save came to a halt; the disk may be full" if "inline_container" in str(error) else None
