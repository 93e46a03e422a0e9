"""Files and folders that are there whole or not at all, whatever ends the process or the machine.

There is one way: something is written beside its place, brought to the disk, and then given its name.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ghostssm.files.interrupts import uninterrupted

if TYPE_CHECKING:
    from torch import Tensor


class Unfinished:
    """A file or folder beside its place: what its user writes into ``partial``, `commit` puts there.

    At the end of the context whatever was not committed is removed, and so are folders that were made for it.
    """

    def __init__(self, path: Path):
        absolute = path.absolute()
        self.path = path
        self.partial = absolute.with_name(f".{absolute.name}.partial-{os.getpid()}")
        self._new_parents = [parent for parent in absolute.parents if not parent.exists()]

    def commit(self) -> None:
        """Put what is finished in its place; an old one goes only once the new one stands and is on the disk."""
        put_in_place(self.partial, self.path)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with uninterrupted():
            old = _set_aside(self.partial)
            if old.exists() and not self.path.exists():
                old.rename(self.path)
            for left in (self.partial, old):
                _discard(left)
            for parent in self._new_parents:
                with suppress(OSError):  # not empty: the output is there
                    parent.rmdir()


def write_durably(path: Path, write: Callable[[Path], None]) -> None:
    """Have a file or folder written beside its name, bring it to the disk, and only then give it its name.

    An old file is replaced; OSError if there is a folder with something in it, which may be another process's.
    """
    unfinished = path.with_name(f".{path.name}.unfinished")
    _discard(unfinished)  # of a process that was killed
    write(unfinished)
    put_in_place(unfinished, path, over_folder=False)


@contextmanager
def adding(folder: Path) -> Iterator[Path]:
    """An empty folder within another, into which its files move at the end of the context; none if that fails."""
    place = folder / ".unfinished"
    _discard(place)  # of a process that was killed
    place.mkdir()
    try:
        yield place
        for path in place.iterdir():
            if path.is_dir():
                _discard(folder / path.name)
            path.replace(folder / path.name)
    finally:
        _discard(place)


def put_in_place(finished: Path, path: Path, over_folder: bool = True) -> None:
    """Give a finished file or folder its name; an old one goes only once the new one stands and is on the disk.

    Args:
        over_folder: whether a folder that is not empty may be replaced; OSError if it may not.
    """
    umask = os.umask(0)
    os.umask(umask)
    for file in (finished, *finished.rglob("*")):
        if file.is_file():
            file.chmod(0o666 & ~umask)  # some writers leave files that only their owner can read
    synchronise(finished)
    old = _set_aside(finished)
    with uninterrupted():
        if finished.is_dir():
            if over_folder and path.exists():
                path.rename(old)
            finished.rename(path)
        else:
            finished.replace(path)
    synchronise(path.absolute().parent, inside=False)
    _discard(old)


def _set_aside(finished: Path) -> Path:
    """Where the old folder waits while a finished one takes its place."""
    return finished.with_name(finished.name + ".old")


def _discard(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON values, numbers so that they are read back bit by bit."""
    text = json.dumps(value, indent=1) + "\n"

    def write(place: Path) -> None:
        place.write_text(text, encoding="utf-8")

    write_durably(path, write)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file of tensors on any device."""
    import safetensors.torch  # which imports PyTorch; outputs are checked before that

    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    write_durably(path, lambda place: safetensors.torch.save_file(plain, place, metadata={"format": "pt"}))


def synchronise(path: Path, inside: bool = True) -> None:
    """Bring to the disk a file's contents, or a folder's list of files and, ``inside`` it, all of these."""
    for part in (*path.rglob("*"), path) if inside else (path,):
        handle = os.open(part, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
