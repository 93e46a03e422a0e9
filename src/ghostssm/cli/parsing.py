"""A verb's parser, made of a request's fields and the verb's own arguments; and the request made of what was parsed.

An option is described once, where it is declared: `ghostssm.workflows.options` shows the form.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from functools import partial, wraps
from itertools import pairwise
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, Union, get_args, get_origin

import typer
from rich.markup import escape
from typer.core import TyperCommand

from ghostssm.cli.completion import KINDS, Kind
from ghostssm.errors import InputError, did_you_mean
from ghostssm.workflows.options import Described, Option, Panel, called_with, options_of
from ghostssm.workflows.request_checks import check_places, check_request

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Asked = TypeVar("Asked", bound="DataclassInstance")
Verb = Callable[..., None]
Prepared = Callable[..., Callable[[], None]]
"""A verb that takes what was parsed, refuses it or gives the work: what is refused needs no PyTorch for that."""
AsJson = Annotated[bool, Option(panel="Other options", flag="--json", text="print the result as JSON.")]
_PANELS = get_args(Panel)
_LAST_OPTION = "ghostssm.last_option"


def verb(function: Prepared) -> Prepared:
    """Make a verb whose arguments are all its own. It checks them, and gives the work."""

    @wraps(function)
    def prepared(**given: Any) -> Callable[[], None]:
        return called_with(function, given)

    return _with_options(prepared, options_of(function))


def asks_for(kind: type[Asked], amended: Callable[..., Asked] | None = None) -> Callable[[Verb], Prepared]:
    """Make a verb that takes the fields of a request beside its own arguments, and is called with the checked request.

    The verb's first parameter is the request; in the help, its own options come before those of the request.

    Args:
        amended: gives the request as further options change it, which are its parameters after the request. The verb
            gets those that it has a parameter for.
    """

    def decorate(function: Verb) -> Prepared:
        own, changing = options_of(function), () if amended is None else options_of(amended)
        taken = inspect.signature(function).parameters

        @wraps(function)
        def prepared(**given: Any) -> Callable[[], None]:
            mine = {each.name: given.pop(each.name) for each in (*own, *changing)}
            request = requested(kind, given)
            if amended is not None:
                request = amended(request, **{each.name: mine[each.name] for each in changing})
            check_request(request)
            check_places(request)
            return partial(function, request, **{name: mine[name] for name in mine if name in taken})

        return _with_options(prepared, (*own, *changing, *options_of(kind)))

    return decorate


def requested(kind: type[Asked], given: Mapping[str, Any]) -> Asked:
    """The request made of the parsed values."""
    usual = (each for each in options_of(kind) if each.option.usual is not None and given.get(each.name) is None)
    absent = {each.name: each.usual_value(given) for each in usual}
    return called_with(kind, {**given, **absent})


def _with_options(function: Prepared, options: tuple[Described, ...]) -> Prepared:
    """Give a verb the signature from which typer makes its parser."""
    ordered = sorted(options, key=lambda each: _PANELS.index(each.option.panel))
    parameters = [_parameter(each) for each in ordered]
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    function.__annotations__ = {each.name: each.annotation for each in parameters}
    return function


def _parameter(described: Described) -> inspect.Parameter:
    option, default, text = described.option, described.default, described.text
    kind, several = _parsed_type(described.type)
    told: dict[str, Any] = {
        "metavar": f"{option.value} ..." if several else option.value or None,
        "help": escape(text[0].upper() + text[1:]),
        "rich_help_panel": option.panel or None,
        "callback": _check_of(described),
        "autocompletion": KINDS.get(option.value, Kind()).complete,
        "show_default": True if option.usual is None else option.usual.text,
    }
    if option.required:
        default = inspect.Parameter.empty
    elif option.usual is not None:
        default = None
    elif several and default is not inspect.Parameter.empty:
        default = list(default or ()) or None
    info = typer.Argument(**told) if option.positional else typer.Option(described.flag, **told)
    annotation: Any = Annotated[kind, info]
    return inspect.Parameter(described.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _parsed_type(hint: Any) -> tuple[Any, bool]:
    """The type that typer parses, a list in place of a tuple and without None, and whether it takes several values."""
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    (kind,) = (part for part in parts if part is not NoneType)
    several = get_origin(kind) is tuple
    return (list[get_args(kind)[0]] if several else kind), several  # type: ignore[misc]


def _check_of(described: Described) -> Callable[[Any], Any]:
    """The callback that raises InputError for a number out of bounds and for an unknown name."""
    flag = described.flag
    known = KINDS.get(described.option.value, Kind())

    def check(value: Any) -> Any:
        described.check(value)
        several = isinstance(value, list)
        for one in value if several else [] if value is None else [value]:
            if several and isinstance(one, str) and "," in one and not known.commas:
                names = " ".join(filter(None, map(str.strip, one.split(","))))
                raise InputError(f"{flag} is {one!r}; expected names separated by spaces: {flag} {names}.")
            if known.check is not None:
                known.check(one)
        return value

    return check


def plain_in_help(parameters: list[Any]) -> list[Any]:
    """Keep the name of the Python type out of the help of flags and arguments."""
    for parameter in parameters:
        if getattr(parameter, "is_flag", False) or parameter.param_type_name == "argument":
            parameter.display_type_rich = lambda ctx: None
    return parameters


class SpacedListCommand(TyperCommand):
    """A command whose repeatable options also take their values in one go, ``--state-size 96 64 32``, each once."""

    def get_params(self, ctx: Any) -> list[Any]:
        return plain_in_help(super().get_params(ctx))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        self._check_values(ctx, args)
        repeatable = {name for option in self._repeatable() for name in option.opts}
        ctx.meta[_LAST_OPTION] = next((argument for argument in reversed(args) if argument.startswith("-")), None)
        rest = super().parse_args(ctx, _repeat(args, repeatable))
        for option in self._repeatable():
            if values := ctx.params.get(option.name):
                ctx.params[option.name] = list(dict.fromkeys(values))
        return rest

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        """Also values that follow a first one: ``--methods ghost out`` goes on to ``output``."""
        for option in self._repeatable():
            if ctx.meta.get(_LAST_OPTION) in option.opts and not incomplete.startswith("-"):
                return list(option.shell_complete(ctx, incomplete))
        return list(super().shell_complete(ctx, incomplete))

    def _check_values(self, ctx: Any, args: list[str]) -> None:
        """Raise InputError for an option that has another one where its value should be."""
        options: list[Any] = [param for param in self.get_params(ctx) if param.param_type_name == "option"]
        names = {name for option in options for name in (*option.opts, *option.secondary_opts)}
        valued = {name for option in options if not option.is_flag for name in option.opts}
        for name, value in pairwise(args):
            if name in valued and value in names:
                raise InputError(f"{name} has no value: {value} follows it. See: ghostssm {self.name} --help")

    def _repeatable(self) -> list[Any]:
        return [option for option in self.params if getattr(option, "multiple", False)]


def _repeat(args: list[str], repeatable: set[str]) -> list[str]:
    """``--x a b`` to ``--x a --x b`` for every repeatable option x."""
    expanded: list[str] = []
    current: str | None = None
    for position, argument in enumerate(args):
        follows_option = position > 0 and args[position - 1] == current
        if argument.startswith("-"):
            current = argument if argument in repeatable else None
        elif current and not follows_option:
            expanded.append(current)
        expanded.append(argument)
    return expanded


def usage_message(error: Any) -> str:
    """What is wrong with a command line, in the form of all other messages; with the name that was probably meant."""
    message = error.format_message().strip().replace("Value error, ", "")
    given = re.search(r"input_value=('[^']*')", str(error.__cause__))
    found = f"{given[1]} was given, " if given else ""
    message = re.sub("Input should be a valid integer.*", f"{found}expected a whole number", message)
    message = re.sub("Input should be a valid number.*", f"{found}expected a number", message)
    message = message if message.endswith((".", "?")) else f"{message}."
    choices = re.search(r"'([^']*)' is not one of (.*)", message)
    guess = did_you_mean(choices[1], re.findall(r"'([^']*)'", choices[2])) if choices else ""
    verb = f" {error.ctx.command.name}" if error.ctx is not None and error.ctx.parent is not None else ""
    return f"{message}{guess} See: ghostssm{verb} --help"
