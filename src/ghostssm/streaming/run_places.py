"""Where the state of a streamed run is, and whether a run may be begun or gone on with there."""

from __future__ import annotations

from pathlib import Path

from ghostssm.errors import OutputError
from ghostssm.files.output_folder import OutputFolder, destination


def run_folder_of(output: Path) -> Path:
    """Where the state of a run that writes an output is."""
    whole = destination(output).absolute()
    return whole.with_name(f"{whole.name}.run")


def is_in_place(folder: Path) -> bool:
    """Whether all that a run left to do is to remove its folder."""
    return (folder / "finished").exists() and not (folder / "output").exists()


def check_run_folder(output: Path, *, resume: bool, overwrite: bool) -> None:
    """Raise OutputError if an output must not be written, or has a run's state and is not to be resumed."""
    folder = run_folder_of(output)
    if is_in_place(folder) and resume:
        return
    OutputFolder(output, overwrite)
    if folder.exists() and not (folder / "run.json").exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(
            f"{folder}, where the run's state would be, holds something else; move it away, or name another --output."
        )
    if (folder / "run.json").exists() and not resume:
        done = len(list((folder / "records").glob("*.json")))
        raise OutputError(
            f"{folder} holds a run that ended after {done} layers; pass --resume to go on, or remove that folder to "
            "start again."
        )
