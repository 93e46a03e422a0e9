"""Arguments that several verbs share, and options that take several values after one another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, local folder, or 'reference'.")]
StateSizes = Annotated[
    list[int], typer.Option("--state-size", metavar="R ...", help="State sizes N' to prune to, one or several.")
]
CalibrationText = Annotated[str, typer.Option("--calibration", metavar="TEXT", help="Text to calibrate on.")]
EvaluationText = Annotated[str, typer.Option("--text", metavar="TEXT", help="Text to measure the loss on.")]
CalibrationWindows = Annotated[int, typer.Option("--windows", help="Calibration windows, drawn at random.")]
EvaluationWindows = Annotated[
    int | None, typer.Option("--text-windows", help="Windows to measure the loss on; all of the text if not given.")
]
WindowLength = Annotated[int, typer.Option("--window-length", help="Tokens per window.")]
Groups = Annotated[
    Literal["equal", "pooled"],
    typer.Option("--groups", help="'equal': every group keeps R. 'pooled': groups compete, then are zero-padded."),
]
Engines = Annotated[
    list[str] | None,
    typer.Option(
        "--engine",
        metavar="NAME ...",
        help="Engines that are to run the result, such as vllm or llama.cpp-cuda; 'ghostssm inspect' lists them.",
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="Draws the calibration windows, and random choices.")]
Tokenizer = Annotated[
    str | None, typer.Option("--tokenizer", help="Folder or hub id of the tokenizer, if the model has none.")
]
Device = Annotated[str, typer.Option("--device", help="Where to compute: cpu, cuda, cuda:1 ...")]
Offload = Annotated[
    Path | None,
    typer.Option(
        "--offload",
        metavar="FOLDER",
        help="With --stream: keep what grows with the windows in memory-mapped files there, not in memory.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON to standard output.")]


class SpacedListCommand(TyperCommand):
    """A command whose repeatable options also take their values in one go: ``--state-size 96 64 32``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        repeatable = {name for option in self.params if getattr(option, "multiple", False) for name in option.opts}
        return super().parse_args(ctx, _repeat(args, repeatable))


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
