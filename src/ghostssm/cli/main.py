"""The command's entry: verbs, and what happens to errors."""

from __future__ import annotations

import os
import sys

import typer

from ghostssm.cli import compare, evaluate, generate, inspect, prune
from ghostssm.cli.arguments import SpacedListCommand
from ghostssm.cli.console import print_error
from ghostssm.errors import GhostError, InputError

_EXIT_FAILED, _EXIT_BAD_INPUT, _EXIT_INTERRUPTED = 1, 2, 130

app = typer.Typer(
    name="ghostssm",
    help="Make trained Mamba-2 models decode with a much smaller recurrent state.",
    epilog="MODEL is a hub id, a local folder (transformers or mamba_ssm dialect), or 'reference', the built-in model. "
    "TEXT is a .txt, .jsonl or .parquet file, a folder of text, 'wikitext2' or 'stdlib'.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for verb in (inspect.inspect, prune.prune, compare.compare, evaluate.evaluate, generate.generate):
    app.command(cls=SpacedListCommand)(verb)


def main() -> None:
    """Run the command; a user's mistake ends in one line and exit code 2, never in a traceback."""
    # transformers would tell of every kernel package that is not installed.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app()
    except InputError as error:
        print_error(str(error))
        sys.exit(_EXIT_BAD_INPUT)
    except GhostError as error:
        print_error(str(error))
        sys.exit(_EXIT_FAILED)
    except KeyboardInterrupt:
        print_error("interrupted; nothing was written.")
        sys.exit(_EXIT_INTERRUPTED)
