"""From a verb's arguments to the library's request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Asked = TypeVar("Asked", bound="DataclassInstance")


def requested(kind: type[Asked], arguments: Mapping[str, Any], **others: Any) -> Asked:
    """A request, each field from the verb's argument of that name; lists become tuples.

    Args:
        arguments: the verb's ``locals()``, at its beginning.
        others: fields whose arguments have other names. None is an argument that was not given.
    """
    names = [each.name for each in fields(kind)]
    values = {name: arguments[name] for name in names if name in arguments} | others
    given = {name: value for name, value in values.items() if value is not None}
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})
