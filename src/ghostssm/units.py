"""Numbers and names for people."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import PurePath

from ghostssm.errors import InputError

_MEMORY = re.compile(r"(\d+(?:\.\d+)?) ?(?:([KMGT])(i?))?B", re.IGNORECASE)


def text_name(name: str) -> str:
    """A text's name: of a path the last part."""
    return PurePath(name).name or name


def dtype_name(dtype: object) -> str:
    """A torch dtype's name, such as ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def listed(items: Sequence[str], most: int, separator: str = ", ") -> str:
    """The first ``most`` items for a message, and how many more there are."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return separator.join(items[:most]) + more


def counted(count: int, what: str) -> str:
    """A number of things, such as ``1 window`` or ``8 windows``."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def one_or_all(sizes: Sequence[int]) -> int | list[int]:
    """State sizes for a program to read: one number where all layers have the same."""
    return sizes[0] if len(set(sizes)) == 1 else list(sizes)


def sizes_text(sizes: Sequence[int]) -> str:
    """State sizes for a person: one number where all layers have the same, else the range."""
    return f"{sizes[0]}" if len(set(sizes)) == 1 else f"{min(sizes)} to {max(sizes)}"


def plus_minus(mean: float, error: float) -> str:
    """A mean with its standard error, which is NaN where there is none; what rounds to zero has no sign."""
    return f"{mean:z.4f}" if math.isnan(error) else f"{mean:z.4f} ± {error:.4f}"


def duration_text(seconds: float) -> str:
    """A time to wait, in the unit that suits it."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def bytes_text(count: float) -> str:
    """A number of bytes, binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def memory_bytes(text: str) -> int:
    """Bytes of a memory's size such as ``80GiB`` or ``24 GB``; the latter counts by thousands.

    Raises:
        InputError: it is no such size, or 0.
    """
    match = _MEMORY.fullmatch(text.strip())
    power = 0 if match is None or not match[2] else "KMGT".index(match[2].upper()) + 1
    count = 0.0 if match is None else float(match[1]) * (1024 if match[3] else 1000) ** power
    if count < 1:
        raise InputError(f"The memory is {text!r}; expected a size with its unit, such as 80GiB or 24GB.")
    return round(count)
