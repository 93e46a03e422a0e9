"""Folders and files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ghostssm.errors import OutputError, StorageError
from ghostssm.files.durable import Unfinished

PLAN_FILE, PAGE_FILE = "plan.json", "report.html"
"""In the folder of a pruned checkpoint."""
_CONFIG_FILE = "config.json"


class OutputFolder(Unfinished):
    """A folder that appears whole or not at all.

    Opened before the work, so that a folder that may not be written is refused at once:

        with OutputFolder(path) as folder:
            ...                 # write into folder.partial
            folder.commit()
    """

    def __init__(self, path: Path | str, overwrite: bool = False):
        """
        Args:
            path: of the folder.
            overwrite: replace an output folder that is not empty, if it holds a checkpoint.

        Raises:
            OutputError: the path is a file, a folder with something in it (unless it is a checkpoint and
                ``overwrite``), or not writable.
        """
        super().__init__(destination(path))
        if self.path.exists() and not self.path.is_dir():
            raise OutputError(f"{self.path} is a file; expected a folder to write.")
        if self.path.is_dir() and any(self.path.iterdir()) and not overwrite:
            raise OutputError(f"{self.path} exists and is not empty; name another folder, or pass --overwrite.")
        if self.path.is_dir() and any(self.path.iterdir()) and not (self.path / _CONFIG_FILE).is_file():
            raise OutputError(
                f"{self.path} holds other things than a checkpoint (there is no {_CONFIG_FILE} in it), so it is not "
                "replaced; name another folder, or empty this one."
            )
        place = self.partial.parents[len(self._new_parents)]
        if place.is_dir() and not os.access(place, os.W_OK | os.X_OK):
            raise OutputError(f"{self.path} can't be written: {place} is read-only; name another folder.")

    def __enter__(self) -> OutputFolder:
        try:
            self.partial.mkdir(parents=True)
        except OSError as error:
            raise OutputError(f"{self.path} can't be written: {error.strerror or error}.") from error
        return self


class OutputFile(Unfinished):
    """As `ghostssm.OutputFolder`, for one file: opened before the work, put in place by ``commit``.

    with OutputFile(path) as file:
        ...                 # write file.partial
        file.commit()
    """

    def __init__(self, path: Path | str, overwrite: bool = False):
        """
        Raises:
            OutputError: the path is a folder, or ends as one does, or a file (unless ``overwrite``).
        """
        super().__init__(Path(path))
        if self.path.is_dir() or str(path).endswith(os.sep):
            raise OutputError(f"{self.path} is a folder; expected the name of a file to write.")
        if self.path.exists() and not overwrite:
            raise OutputError(f"{self.path} exists; name another file, or pass --overwrite.")

    def __enter__(self) -> OutputFile:
        try:
            self.partial.parent.mkdir(parents=True, exist_ok=True)
            self.partial.touch()
        except OSError as error:
            raise OutputError(
                f"{self.path} can't be written: {error.strerror or error}. Name another --output."
            ) from error
        return self


def destination(path: Path | str) -> Path:
    """The folder that a path means, once links are followed; a finished folder can be renamed to it.

    Raises:
        OutputError: the current folder, one above it, or the root of a disk, none of which can be renamed.
    """
    if not str(path).strip():
        raise OutputError("The output's name is empty; expected a folder.")
    place = Path(path).resolve() if Path(path).is_symlink() else Path(path)
    whole = place.resolve()
    if whole == Path.cwd() or whole in Path.cwd().parents or os.path.ismount(whole):
        raise OutputError(f"{path} is in use and can't be replaced as a whole; name a folder in it.")
    return place


def check_apart(output: Path | str, model: Path | str) -> None:
    """Raise OutputError for an output that would replace the model it is made of."""
    source = Path(model).resolve()
    if source.is_dir() and source.is_relative_to(Path(output).resolve()):
        raise OutputError(f"{output} holds the model {model} itself; name another folder.")


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
