"""A folder that keeps the state of a run: what the run is, in run.json, and that no other process works on it."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from ghostssm.errors import OutputError
from ghostssm.files import durable

RUN_FILE = "run.json"


def open_run(folder: Path, identity: Mapping[str, Any]) -> tuple[IO[str], bool]:
    """Take the folder of a run for this process; make it, with its run.json, where there is none.

    Args:
        identity: what decides the result, by names that users know: JSON values.

    Returns:
        what holds the folder until it is closed, and whether the folder is new.

    Raises:
        OutputError: it can't be used, is of a run with another identity, or another process works on it.
    """
    is_new = not (folder / RUN_FILE).exists()
    lock = None
    try:
        if is_new:
            durable.write_durably(folder, lambda place: _create(place, identity))
        lock = (folder / RUN_FILE).open(encoding="utf-8")
        _check(folder, lock, identity)
    except (OSError, ValueError) as error:
        _close(lock)
        raise OutputError(f"The run's folder {folder} can't be used: {error}.") from error
    except OutputError:
        _close(lock)
        raise
    return lock, is_new


def _create(folder: Path, identity: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True)
    durable.write_json(folder / RUN_FILE, dict(identity))


def _check(folder: Path, lock: IO[str], identity: Mapping[str, Any]) -> None:
    if sys.platform != "win32":
        import fcntl

        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(f"Another process works on the run in {folder}; wait for its end.") from None
    kept = json.load(lock)
    for field in (*identity, *kept):
        before, now = kept.get(field), identity.get(field)
        if before != now:
            raise OutputError(
                f"{folder} holds a run that differs in {field}: it was {before!r}, now it is {now!r}. Go on "
                "with the same model, text, options and versions, or remove that folder to start again."
            )


def _close(lock: IO[str] | None) -> None:
    if lock is not None:
        lock.close()
