"""Where a MODEL is, by its name alone; no file of it is read."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

from ghostssm.errors import ModelError

REFERENCE = "reference"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def folder_of(spec: str) -> Path | None:
    """The folder that a model's name means; None for an id on the hub.

    Raises:
        ModelError: it is neither, or no folder is there.
    """
    if spec == REFERENCE:
        # Some installers link every file of a package to a store of their own.
        return (Path(str(resources.files("ghostssm") / "reference")) / "config.json").resolve().parent
    if Path(spec).is_dir():
        return Path(spec)
    if Path(spec).exists():
        raise ModelError(f"{spec} is a file; expected the folder that holds config.json and the weights.")
    if spec.startswith((".", "/", "~")) or spec.count("/") > 1:
        raise ModelError(f"There is no folder {spec!r}; expected one with config.json and the weights in it.")
    if not is_hub_id(spec):
        raise ModelError(f"No model at {spec!r}; expected a local folder, a hub id such as org/name, or '{REFERENCE}'.")
    return None


def written_folder(folder: Path | str) -> Path:
    """The folder of a checkpoint that ghostssm wrote; raises ModelError where there is none."""
    path = Path(folder)
    if not path.is_dir():
        raise ModelError(f"{folder} is no folder; expected a checkpoint that ghostssm wrote.")
    return path


def is_hub_id(name: str) -> bool:
    """Whether a name can be a model's on the hub: org/name."""
    return _HUB_ID.fullmatch(name) is not None
