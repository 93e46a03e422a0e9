"""How a command line is read: options that take several values after one another, and what is wrong with one."""

from __future__ import annotations

import re
from typing import Any

from typer.core import TyperCommand

from ghostssm.errors import did_you_mean

_LAST_OPTION = "ghostssm.last_option"


def usage_message(error: Any) -> str:
    """What the parser found wrong, in the form of the other messages; with the name that may have been meant."""
    message = error.format_message().strip().replace("Value error, ", "")
    message = re.sub("Input should be a valid integer.*", "expected a whole number", message)
    message = re.sub("Input should be a valid number.*", "expected a number", message)
    message = message if message.endswith((".", "?")) else f"{message}."
    choices = re.search(r"'([^']*)' is not one of (.*)", message)
    guess = did_you_mean(choices[1], re.findall(r"'([^']*)'", choices[2])) if choices else ""
    verb = f" {error.ctx.command.name}" if error.ctx is not None and error.ctx.parent is not None else ""
    return f"{message}{guess} See: ghostssm{verb} --help"


def plain_in_help(parameters: list[Any]) -> list[Any]:
    """Parameters that help shows without the name of a Python type."""
    for parameter in parameters:
        if getattr(parameter, "is_flag", False) or parameter.param_type_name == "argument":
            parameter.display_type_rich = lambda ctx: None
    return parameters


class SpacedListCommand(TyperCommand):
    """A command whose repeatable options also take their values in one go, ``--state-size 96 64 32``, each once."""

    def get_params(self, ctx: Any) -> list[Any]:
        return plain_in_help(super().get_params(ctx))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
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
