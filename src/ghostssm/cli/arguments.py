"""Arguments that several verbs share, and options that take several values after one another."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from ghostssm.cli import completion
from ghostssm.errors import InputError, did_you_mean

TEXT_PANEL, HOW_PANEL, OUTPUT_PANEL, MEMORY_PANEL, OTHER_PANEL = (
    "Text",
    "How",
    "Output",
    "Larger than memory",
    "Other options",
)
"""Titles that options are grouped under in a verb's help; what a verb is about comes first, under no title."""


def at_least(least: int, most: int | None = None) -> Callable[[typer.CallbackParam, Any], Any]:
    """The callback of an option for whole numbers, one or several, that raises InputError for one out of bounds."""
    expected = f"{least} or more" if most is None else f"from {least} to {most}"

    def check(param: typer.CallbackParam, value: Any) -> Any:
        for number in value if isinstance(value, (list, tuple)) else [value]:
            if number is not None and not (least <= number and (most is None or number <= most)):
                raise InputError(f"{param.opts[0]} is {number}; expected {expected}.")
        return value

    return check


def _checked_by(check: Callable[[str], None]) -> Callable[[typer.CallbackParam, Any], Any]:
    """The callback of an option for names, one or several, that are checked before PyTorch is imported."""

    def checked(param: typer.CallbackParam, value: Any) -> Any:
        several = isinstance(value, (list, tuple))
        if several:
            check_separated(param.opts[0], value)
        for name in value if several else [value]:
            if name is not None:
                check(name)
        return value

    return checked


recipes_known, engines_known, tables_known = map(
    _checked_by, (completion.check_recipe, completion.check_engine, completion.check_table)
)


def _default_text(context: typer.Context, value: str) -> str:
    """The built-in model was trained on code, which every machine has; others are calibrated as the paper has it."""
    if context.params.get("tasks") or context.params.get("last_words"):  # of evaluate, which then reads no text
        return value or "wikitext2"
    return value or ("stdlib" if context.params.get("model") == completion.REFERENCE else "wikitext2")


_DEFAULT_TEXTS = "wikitext2; stdlib for 'reference'"
Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="Hub id, local folder, or 'reference'.", autocompletion=completion.models),
]
StateSizes = Annotated[
    list[int] | None,
    typer.Option("--state-size", metavar="N' ...", help="State sizes N' to prune to, one or several."),
]
CalibrationText = Annotated[
    str,
    typer.Option(
        "--calibration",
        metavar="TEXT",
        help="Text to calibrate on.",
        rich_help_panel=TEXT_PANEL,
        show_default=_DEFAULT_TEXTS,
        callback=_default_text,
        autocompletion=completion.texts,
    ),
]
EvaluationText = Annotated[
    str,
    typer.Option(
        "--text",
        metavar="TEXT",
        help="Text to measure the loss on.",
        rich_help_panel=TEXT_PANEL,
        show_default=_DEFAULT_TEXTS,
        callback=_default_text,
        autocompletion=completion.texts,
    ),
]
CalibrationWindows = Annotated[
    int,
    typer.Option(
        "--windows",
        metavar="COUNT",
        help="How many windows of the text to calibrate on. They are drawn at random.",
        rich_help_panel=TEXT_PANEL,
    ),
]
EvaluationWindows = Annotated[
    int | None,
    typer.Option(
        "--text-windows",
        metavar="COUNT",
        help="How many windows to measure the loss on. All of the text if not given.",
        rich_help_panel=TEXT_PANEL,
    ),
]
WindowLength = Annotated[
    int, typer.Option("--window-length", metavar="TOKENS", help="Tokens per window.", rich_help_panel=TEXT_PANEL)
]
Groups = Annotated[
    Literal["equal", "pooled"],
    typer.Option(
        "--groups",
        metavar="HOW",
        help="'equal': every group of heads keeps N' channels. 'pooled': groups may keep different numbers; the "
        "smaller ones are padded with zeros.",
        rich_help_panel=HOW_PANEL,
    ),
]
Engines = Annotated[
    list[str] | None,
    typer.Option(
        "--engine",
        metavar="NAME ...",
        help="Engines, such as vllm or llama.cpp-cuda. 'ghostssm inspect reference' lists all of them.",
        callback=engines_known,
        autocompletion=completion.engines,
    ),
]
Seed = Annotated[
    int,
    typer.Option(
        "--seed",
        metavar="NUMBER",
        callback=at_least(0, 2**63 - 1),
        help="The same number draws the same windows and makes the same random choices.",
        rich_help_panel=OTHER_PANEL,
    ),
]
Offload = Annotated[
    Path | None,
    typer.Option(
        "--offload",
        metavar="FOLDER",
        help="With --stream: keep there, in files, what grows with the number of windows. It takes less memory.",
        rich_help_panel=MEMORY_PANEL,
    ),
]
Tokenizer = Annotated[
    str | None,
    typer.Option(
        "--tokenizer",
        metavar="PLACE",
        help="Folder or hub id of the tokenizer, if the model has none.",
        rich_help_panel=OTHER_PANEL,
    ),
]
StateDtype = Annotated[
    str | None,
    typer.Option(
        "--state-dtype",
        metavar="NAME",
        help="Of the recurrent state, rounded after every token: float32, bfloat16, float16, int8, fp8 or int4. If not "
        "given, that which the checkpoint was pruned for, else float32.",
        rich_help_panel=HOW_PANEL,
        autocompletion=completion.state_dtypes,
    ),
]
StateDtypes = Annotated[
    list[str],
    typer.Option(
        "--state-dtype",
        metavar="NAME ...",
        help="Of the recurrent state, one or several: float32, bfloat16, float16, int8, fp8, int4.",
        rich_help_panel=HOW_PANEL,
        autocompletion=completion.state_dtypes,
    ),
]
StateRounding = Annotated[
    str,
    typer.Option(
        "--state-rounding",
        metavar="HOW",
        help="Of a state narrower than float32: nearest or stochastic.",
        rich_help_panel=HOW_PANEL,
    ),
]
Device = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="NAME",
        help="Where to compute: cpu, cuda, cuda:1 ...",
        rich_help_panel=OTHER_PANEL,
        autocompletion=completion.devices,
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace an output folder that is not empty.", rich_help_panel=OUTPUT_PANEL),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.", rich_help_panel=OTHER_PANEL)]
_LAST_OPTION = "ghostssm.last_option"


def check_separated(option: str, values: Sequence[str] | None) -> None:
    """Raise InputError for a value that joins several names by commas."""
    for value in values or ():
        names = [name.strip() for name in value.split(",") if name.strip()]
        if "," in value:
            raise InputError(f"{option} is {value!r}; expected names separated by spaces: {option} {' '.join(names)}.")


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
