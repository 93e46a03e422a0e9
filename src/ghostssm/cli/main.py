"""The command's entry: its verbs, and what becomes of errors."""

from __future__ import annotations

import functools
import inspect as inspect_module
import os
from collections.abc import Callable

import typer

from ghostssm.cli import bench, compare, evaluate, export, generate, inspect, prune, reproduce
from ghostssm.cli.arguments import SpacedListCommand
from ghostssm.cli.console import print_error
from ghostssm.errors import GhostError, InputError

_EXIT_FAILED, _EXIT_BAD_INPUT, _EXIT_INTERRUPTED = 1, 2, 130

_GUIDE = (
    """Make trained Mamba-2 models decode with a much smaller recurrent state.

\bThe shortest way, with the built-in model:
$ ghostssm inspect reference --state-size 64 32
$ ghostssm prune reference --state-size 64 --calibration stdlib --output small
$ ghostssm generate small --prompt "def main("

\bEach verb's --help has examples. --install-completion lets the shell complete
verbs, options, methods and engines."""
    ""
)

app = typer.Typer(
    name="ghostssm",
    help=_GUIDE,
    epilog="MODEL is a hub id, a local folder (transformers or mamba_ssm dialect), or 'reference', the built-in model. "
    "TEXT is a .txt, .jsonl or .parquet file, a folder of text, 'wikitext2' or 'stdlib'.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _with_exit_codes(verb: Callable[..., None]) -> Callable[..., None]:
    """A user's mistake ends in one message and exit code 2, never in a traceback."""

    @functools.wraps(verb)
    def wrapped(*args: object, **kwargs: object) -> None:
        try:
            verb(*args, **kwargs)
        except GhostError as error:
            print_error(str(error))
            raise typer.Exit(_EXIT_BAD_INPUT if isinstance(error, InputError) else _EXIT_FAILED) from None
        except KeyboardInterrupt as interrupt:
            print_error(str(interrupt) or "interrupted; nothing was written.")
            raise typer.Exit(_EXIT_INTERRUPTED) from None

    return wrapped


def _help(verb: Callable[..., None]) -> str:
    """A verb's docstring, with its last paragraph as examples, line by line."""
    text, _, examples = inspect_module.cleandoc(verb.__doc__ or "").rpartition("\n\n")
    lines = "\n".join(f"$ {line}" for line in examples.splitlines())
    return f"{text}\n\n\bExamples:\n{lines}"


_VERBS: dict[str, tuple[Callable[..., None], ...]] = {
    "Look, prune, try": (inspect.inspect, prune.prune, generate.generate),
    "Measure": (evaluate.evaluate, compare.compare, bench.bench),
    "Run it elsewhere": (export.export,),
    "Check the paper": (reproduce.reproduce,),
}
"""By task, the shortest way first."""
for _task, _verbs in _VERBS.items():
    for _verb in _verbs:
        app.command(cls=SpacedListCommand, rich_help_panel=_task, help=_help(_verb))(_with_exit_codes(_verb))


def main() -> None:
    """Run the command."""
    # transformers would tell of every kernel package that is not installed.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    app()
