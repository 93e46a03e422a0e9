"""What all values of the project have in common: they print in a line or two, and tensors in them compare.

PyTorch is imported when values are compared or printed: requests are values too, and a help is made of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import MISSING, Field, fields, is_dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch import Tensor

_LONGEST = 40
_LONGEST_VALUE = 90
_LISTED = 4


class Value:
    """Base of dataclasses that may hold much; they are declared with ``repr=False``, and with ``eq=False`` if tensors
    are in them.

    Printed, a value names those of its fields that are not as usual, each in a few words. Two are equal if all their
    fields are, by `same`.
    """

    def __repr__(self) -> str:
        shown = (each for each in fields(self) if each.repr and not _is_usual(each, self))  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(f'{each.name}={short(getattr(self, each.name))}' for each in shown)})"

    def __eq__(self, other: object) -> bool:
        return same(self, other) if type(other) is type(self) else NotImplemented

    # Tensors have no hash of their numbers.
    __hash__: ClassVar[None] = None  # type: ignore[assignment]


def _is_usual(field: Field[Any], value: Any) -> bool:
    usual = field.default if field.default_factory is MISSING else field.default_factory()
    return usual is not MISSING and same(getattr(value, field.name), usual)


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal: tensors by shape, dtype and numbers, wherever they lie; NaN equals NaN.

    Tensors without numbers (on the device ``meta``) equal only one another.
    """
    from torch import Tensor

    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and _same_tensors(one, other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if type(one) is not type(other):
        return bool(one == other)
    if is_dataclass(one):
        return all(same(getattr(one, each.name), getattr(other, each.name)) for each in fields(one) if each.compare)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other or (isinstance(one, float) and math.isnan(one) and math.isnan(other)))


def _same_tensors(one: Tensor, other: Tensor) -> bool:
    import torch

    if (one.shape, one.dtype, one.is_meta) != (other.shape, other.dtype, other.is_meta):
        return False
    return one.is_meta or torch.equal(one.detach().cpu(), other.detach().cpu())


def short(value: Any) -> str:
    """A value in a few words, for a line that is about something else."""
    if isinstance(value, str | PathLike):
        text = str(value)
        return repr(text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "...")
    from torch import Tensor, nn

    if isinstance(value, Tensor):
        return f"Tensor{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, nn.Module):
        return f"<{type(value).__name__}>"
    if isinstance(value, Mapping) and len(value) > 1:
        return f"<{len(value)} entries>"
    if isinstance(value, Sequence | Set) and not isinstance(value, bytes):
        listed = list(value)[:_LISTED]
        more = ", ..." if len(value) > _LISTED else ""
        text = f"[{', '.join(map(short, listed))}{more}]"
        return text if len(text) <= _LONGEST else f"<{len(value)} entries>"
    longest = _LONGEST_VALUE if isinstance(value, Value) else _LONGEST
    text = repr(value)
    return text if len(text) <= longest and "\n" not in text else f"<{type(value).__name__}>"
