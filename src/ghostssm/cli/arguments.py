"""Arguments that several verbs share, and options that take several values after one another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from ghostssm.cli import completion
from ghostssm.errors import InputError

TEXT_PANEL, HOW_PANEL, OUTPUT_PANEL, MEMORY_PANEL, OTHER_PANEL = (
    "Text",
    "How",
    "Output",
    "Larger than memory",
    "Other options",
)
"""Titles that options are grouped under in a verb's help; what a verb is about comes first, under no title."""

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="Hub id, local folder, or 'reference'.", autocompletion=completion.models),
]
StateSizes = Annotated[
    list[int], typer.Option("--state-size", metavar="R ...", help="State sizes N' to prune to, one or several.")
]
CalibrationText = Annotated[
    str,
    typer.Option(
        "--calibration",
        metavar="TEXT",
        help="Text to calibrate on.",
        rich_help_panel=TEXT_PANEL,
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
        autocompletion=completion.texts,
    ),
]
CalibrationWindows = Annotated[
    int,
    typer.Option("--windows", metavar="N", help="Calibration windows, drawn at random.", rich_help_panel=TEXT_PANEL),
]
EvaluationWindows = Annotated[
    int | None,
    typer.Option(
        "--text-windows",
        metavar="N",
        help="Windows to measure the loss on; all of the text if not given.",
        rich_help_panel=TEXT_PANEL,
    ),
]
WindowLength = Annotated[
    int, typer.Option("--window-length", metavar="N", help="Tokens per window.", rich_help_panel=TEXT_PANEL)
]
Groups = Annotated[
    Literal["equal", "pooled"],
    typer.Option(
        "--groups",
        metavar="HOW",
        help="'equal': every group keeps R. 'pooled': groups compete, then are zero-padded.",
        rich_help_panel=HOW_PANEL,
    ),
]
Engines = Annotated[
    list[str] | None,
    typer.Option(
        "--engine",
        metavar="NAME ...",
        help="Engines that are to run the result, such as vllm or llama.cpp-cuda; 'ghostssm inspect' lists them.",
        autocompletion=completion.engines,
    ),
]
Seed = Annotated[
    int,
    typer.Option(
        "--seed",
        metavar="N",
        min=0,
        max=2**63 - 1,
        help="Draws the calibration windows, and random choices.",
        rich_help_panel=OTHER_PANEL,
    ),
]
Offload = Annotated[
    Path | None,
    typer.Option(
        "--offload",
        metavar="FOLDER",
        help="With --stream: keep what grows with the windows in memory-mapped files there, not in memory.",
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
    str,
    typer.Option(
        "--state-dtype",
        metavar="NAME",
        help="Of the recurrent state, rounded after every token: float32, bfloat16, float16, int8, fp8 or int4.",
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
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON to standard output.", rich_help_panel=OTHER_PANEL)]
_LAST_OPTION = "ghostssm.last_option"


def check_separated(option: str, values: Sequence[str] | None) -> None:
    """Raise InputError for a value that joins several names by commas."""
    for value in values or ():
        names = [name.strip() for name in value.split(",") if name.strip()]
        if "," in value:
            raise InputError(f"{option} is {value!r}; expected names separated by spaces: {option} {' '.join(names)}.")


class SpacedListCommand(TyperCommand):
    """A command whose repeatable options also take their values in one go, ``--state-size 96 64 32``, each once."""

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
