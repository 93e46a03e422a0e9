"""A single file that appears whole or not at all."""

from __future__ import annotations

from pathlib import Path

from ghostssm.errors import OutputError
from ghostssm.files.durable import Unfinished


class OutputFile(Unfinished):
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
        super().__init__(Path(path))
        if self.path.is_dir():
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
