"""What the command needs to know about an option besides its name, type, default and text.

An option is a field of a request, or an argument of a verb:

    windows: Annotated[int, Option("COUNT", "Text")] = 128

Its text is the entry of that name in the docstring, under ``Attributes`` or ``Args``. `ghostssm.cli.parsing` makes
the command's parser of these. Nothing here imports PyTorch, so that a help is there at once.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

from ghostssm.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Made = TypeVar("Made")
Panel = Literal["", "How", "Text", "Scale", "Output", "Other options", "Larger than memory"]
"""Titles that options stand under in a verb's help, from top to bottom; what a verb is about has no title."""
_WRITTEN = frozenset({"DIR", "FILE", "PATH"})
"""What values are called that name a file or folder to be written."""
_SECTION = re.compile(r"^(?:Args|Attributes):\n((?:    .*\n?|\n)*)", re.MULTILINE)
_ENTRY = re.compile(r"^    (\w+): (.*(?:\n {5,}.*)*)", re.MULTILINE)


class Usual(NamedTuple):
    """A default that depends on the other arguments.

    Attributes:
        text: what the help says of it.
        of: from the arguments that were given, by name, to the value.
    """

    text: str
    of: Callable[[Mapping[str, Any]], Any]


@dataclass(frozen=True)
class Option:
    """How the command takes an option's value.

    Attributes:
        value: what the value is called, such as ``TEXT``; `ghostssm.cli.completion.KINDS` completes and checks some by
            that. A flag has none.
        panel: the title that it stands under.
        flag: its name on the command line, if it is not the field's with hyphens; of a switch both, as ``--a/--b``.
        positional: whether it is given without a name.
        required: whether the command needs it, where a call from Python does not.
        least, most: bounds of a number, or of each of several.
        usual: what takes the place of the default.
        text: what the help says of it, if no docstring does.
    """

    value: str = ""
    panel: Panel = ""
    flag: str = ""
    positional: bool = False
    required: bool = False
    least: int | None = None
    most: int | None = None
    usual: Usual | None = None
    text: str = ""


class Described(NamedTuple):
    """An option with its name, type, default and text; the default is `inspect.Parameter.empty` if there is none."""

    name: str
    type: Any
    default: Any
    option: Option
    text: str

    @property
    def flag(self) -> str:
        return self.option.flag or "--" + self.name.replace("_", "-")

    @property
    def is_several(self) -> bool:
        return tuple in _kinds(self.type)

    def usual_value(self, given: Mapping[str, Any]) -> Any:
        """What the command takes where this option is not given, beside other arguments that are."""
        return self.default if self.option.usual is None else self.option.usual.of(given)

    def check(self, value: Any) -> None:
        """Raise InputError for a value, or one of several, that is of another type, out of bounds or no choice."""
        kinds, choices = _kinds(self.type), _choices(self.type)
        if self.is_several and value is not None and not isinstance(value, list | tuple):
            raise InputError(f"{self.flag} is {value!r}; expected several values, or one as ({value!r},).")
        for one in value if isinstance(value, list | tuple) else (value,):
            if one is None:
                continue
            if self.option.value in _WRITTEN and not self.option.positional and not str(one).strip():
                raise InputError(f"{self.flag} is empty; expected a name.")
            if float in kinds and not isinstance(one, Real):
                raise InputError(f"{self.flag} is {one!r}; expected a number.")
            if int in kinds and not isinstance(one, Integral):
                raise InputError(f"{self.flag} is {one!r}; expected a whole number.")
            if choices and one not in choices:
                names = " or ".join(choices)
                raise InputError(f"{self.flag} is {one!r}; expected {names}.{did_you_mean(str(one), choices)}")
            self._check_bounds(one)

    def _check_bounds(self, number: Any) -> None:
        least, most = self.option.least, self.option.most
        if least is not None and not least <= number <= (math.inf if most is None else most):
            expected = f"{least} or more" if most is None else f"from {least} to {most}"
            raise InputError(f"{self.flag} is {number}; expected {expected}.")


@cache
def options_of(source: type[DataclassInstance] | Callable[..., Any]) -> tuple[Described, ...]:
    """The options among a request's fields, its own before those of its bases, or among a function's parameters."""
    hints, texts = get_type_hints(source, include_extras=True), _texts(source)
    defaults = {name: each.default for name, each in inspect.signature(source).parameters.items()}
    if isinstance(source, type):
        own_first = dict.fromkeys(name for owner in source.__mro__ for name in inspect.get_annotations(owner))
        defaults = {name: defaults[name] for name in own_first if name in defaults}
    return tuple(
        Described(name, get_args(hints[name])[0], default, option, option.text or texts[name])
        for name, default in defaults.items()
        for option in get_args(hints[name])[1:]
        if isinstance(option, Option)
    )


def _kinds(hint: Any) -> set[Any]:
    """The types that a value may have; of several values `tuple`, and the types of one."""
    several = {tuple} if get_origin(hint) is tuple else set()
    return several.union(*map(_kinds, get_args(hint))) if get_args(hint) else {hint}


def _choices(hint: Any) -> tuple[str, ...]:
    """What a Literal, or one that may be None, allows; empty for other types."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    return tuple(choice for part in get_args(hint) for choice in _choices(part))


def _texts(source: Any) -> dict[str, str]:
    """The entries of a docstring, those of a class's bases included."""
    owners = reversed(source.__mro__) if isinstance(source, type) else [source]
    sections = [text for owner in owners for text in _SECTION.findall(inspect.cleandoc(owner.__doc__ or ""))]
    return {name: " ".join(text.split()) for section in sections for name, text in _ENTRY.findall(section)}


def flag(kind: type[DataclassInstance], name: str) -> str:
    """A field's name on the command line, such as ``--state-size``; made of its own name if it is no option there."""
    known = {each.name: each.flag.split("/")[0] for each in options_of(kind)}
    return known.get(name, "--" + name.replace("_", "-"))


def called_with(kind: Callable[..., Made], values: Mapping[str, Any]) -> Made:
    """Call a function, or make a request, with named values. None stands for none given; lists become tuples."""
    given = {name: value for name, value in values.items() if value is not None}
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})
