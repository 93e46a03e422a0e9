"""Files that others wrote: nothing outside their folder is opened, nothing of unbounded size is read into memory."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ghostssm.errors import InputError

MOST_JSON_BYTES = 16 << 20
"""Of a JSON document, parsed: an index of a hundred thousand tensors takes less."""
_MOST_NAME_BYTES = 255
_HUB_ENTRIES = ("models--", "datasets--")


def confined(path: Path, fault: type[InputError]) -> Path:
    """The path itself, if it is a regular file that lies in its own folder once links are followed.

    In a snapshot of the hub's cache files are links into the cache entry that the snapshot belongs to; these pass.

    Raises:
        fault: a link that leaves the folder or leads nowhere, a device, a pipe, or a file that may not be looked at.
    """
    try:
        folder, real = path.parent.resolve(), path.resolve()
        regular = real.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # loops of links, names that no file can have
        raise fault(f"{path} can't be read ({error}).") from None
    snapshot = folder.parent.name == "snapshots" and folder.parents[1].name.startswith(_HUB_ENTRIES)
    if not real.is_relative_to(folder.parents[1] if snapshot else folder):
        raise fault(f"{path} is a link to {real}, outside its folder; expected a file. Copy it there if it belongs.")
    if not regular:
        raise fault(f"{path} is missing or no regular file.")
    return path


def is_plain_name(name: str) -> bool:
    """Whether a string names a file in a folder: no path, and no longer than file systems allow."""
    return Path(name).name == name and "\0" not in name and len(name.encode()) <= _MOST_NAME_BYTES


def read_json_object(path: Path, fault: type[InputError]) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        fault: not a regular file in its folder, too large, not UTF-8, not JSON, not an object, or with a key twice.
        FileNotFoundError: there is no such file.
    """
    try:
        if not path.exists() and not path.is_symlink():
            raise FileNotFoundError(path)
        size = confined(path, fault).stat().st_size
        if size > MOST_JSON_BYTES:
            raise fault(f"{path} has {size} bytes; expected a JSON document of at most {MOST_JSON_BYTES}.")
        raw = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise fault(f"{path} can't be read: {error.strerror or error}.") from None
    return parse_json_object(raw, str(path), fault)


def parse_json_object(raw: bytes, where: str, fault: type[InputError]) -> dict[str, Any]:
    """As `read_json_object`, from bytes in memory; ``where`` names them in the message."""
    try:
        document = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_duplicates)
        for _, value in numbers_and_texts(document):
            if isinstance(value, str):
                value.encode()  # half of a surrogate pair is valid JSON, but no text
    except RecursionError:
        raise fault(f"{where} can't be read as JSON (it is nested too deeply).") from None
    except ValueError as error:
        raise fault(f"{where} can't be read as JSON ({error}).") from None
    if not isinstance(document, dict):
        raise fault(f"{where} holds {type(document).__name__}; expected an object.")
    return document


def numbers_and_texts(document: Any) -> Iterator[tuple[str, int | float | str]]:
    """Every number, string and key in a JSON document, each with the name of the entry that it stands in."""
    waiting: list[tuple[str, Any]] = [("", document)]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, dict):
            yield from ((str(key), str(key)) for key in value)
            waiting += [(str(key), inner) for key, inner in value.items()]
        elif isinstance(value, list):
            waiting += [(name, inner) for inner in value]
        elif isinstance(value, (int, float, str)) and not isinstance(value, bool):
            yield name, value


def number_faults(document: Any, most: int) -> list[str]:
    """Numbers in a JSON document that are no numbers, or beyond what any size, count or id can be."""
    faults = []
    for name, value in numbers_and_texts(document):
        if isinstance(value, float) and math.isnan(value):
            faults.append(f"{name} is NaN")
        elif isinstance(value, int) and abs(value) > most:
            faults.append(f"{name} has {len(str(value))} digits, expected a number up to {most}")
    return faults


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"{twice!r} is there twice")
    return entries
