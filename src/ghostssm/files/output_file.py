"""A single file that appears whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

from ghostssm.errors import OutputError
from ghostssm.files.durable import synchronise


class OutputFile:
    """As `ghostssm.OutputFolder`, for one file: opened before the work, put in place by ``commit``.

    with OutputFile(path) as file:
        ...                 # write file.partial
        file.commit()
    """

    def __init__(self, path: Path | str, overwrite: bool = False):
        """
        Raises:
            OutputError: the path is a folder, or a file (unless ``overwrite``).
        """
        self.path = Path(path)
        if self.path.is_dir():
            raise OutputError(f"{self.path} is a folder; expected the name of a file to write.")
        if self.path.exists() and not overwrite:
            raise OutputError(f"{self.path} exists; name another file, or pass --overwrite.")
        self.partial = self.path.absolute().with_name(f".{self.path.name}.partial-{os.getpid()}")

    def __enter__(self) -> OutputFile:
        try:
            self.partial.parent.mkdir(parents=True, exist_ok=True)
            self.partial.touch()
        except OSError as error:
            raise OutputError(
                f"{self.path} can't be written: {error.strerror or error}. Name another --output."
            ) from error
        return self

    def commit(self) -> None:
        """Put the finished file, once it is on the disk, in its place, at one stroke."""
        synchronise(self.partial)
        self.partial.replace(self.path)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.partial.unlink(missing_ok=True)
