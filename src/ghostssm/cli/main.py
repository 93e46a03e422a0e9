"""The command's entry: its verbs, and how errors end."""

from __future__ import annotations

import functools
import inspect as inspect_module
import os
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ghostssm._version import __version__
from ghostssm.cli import bench, compare, distill, evaluate, export, generate, inspect, prune, report, reproduce, verify
from ghostssm.cli.console import print_error, warnings_told
from ghostssm.cli.memory import is_out_of_memory, out_of_memory_message
from ghostssm.cli.parsing import Prepared, SpacedListCommand, plain_in_help, usage_message
from ghostssm.errors import GhostError, InputError
from ghostssm.files.interrupts import EXIT_INTERRUPTED, EXIT_TERMINATED, Terminated, raise_again, terminable
from ghostssm.models.registration import check_transformers
from ghostssm.progress import stage
from ghostssm.report.screen import watched

_EXIT_FAILED, _EXIT_BAD_INPUT = 1, 2
_WITHOUT_USE_CASE = {
    "generate": "ghostssm.models.forward",
    "report": "ghostssm.workflows.report_measuring",
    "verify": "ghostssm.checkpoint.verification",
}
"""By verb what it imports that takes long; other verbs import the use case of their name."""

_GUIDE = """Make trained Mamba-2 models decode with a much smaller recurrent state.

\bThe shortest way, with the built-in model:
$ ghostssm inspect reference --state-size 64 32
$ ghostssm prune reference --state-size 64 --method ghost --windows 8 \\
    --window-length 1024 --output small
$ ghostssm generate small --prompt "def main(" --max-new-tokens 32

\bEach verb's --help has examples. After `ghostssm --install-completion` the
shell completes verbs, options, methods and engines."""

_ClickError: type[Any] = typer.BadParameter.__bases__[0].__bases__[0]
"""The base of what the parser raises; typer has it from click, or as a copy of its own."""


class _Verbs(TyperGroup):
    """The verbs. A fault of the command line is told in the same form as any other fault of the input."""

    def get_params(self, ctx: Any) -> list[Any]:
        return plain_in_help(super().get_params(ctx))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args or ["--help"])

    def main(
        self,
        args: Any = None,
        prog_name: Any = None,
        complete_var: Any = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        try:
            code = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
            if not standalone_mode:
                return code
        except GhostError as error:
            if not standalone_mode:
                raise
            if not error.told:
                print_error(str(error))
            sys.exit(_EXIT_BAD_INPUT if isinstance(error, InputError) else _EXIT_FAILED)
        except _ClickError as error:
            if not standalone_mode:
                raise
            print_error(usage_message(error))
            sys.exit(_EXIT_BAD_INPUT)
        sys.exit(code if isinstance(code, int) else 0)


app = typer.Typer(
    name="ghostssm",
    epilog="MODEL is a hub id, a local folder (transformers or mamba_ssm dialect), or 'reference', the built-in model. "
    "TEXT is a .txt, .jsonl, .json or .parquet file, a folder of text, 'wikitext2' or 'stdlib' (Python's own library). "
    "N is the state size of a model, N' the smaller one that it is pruned to.",
    cls=_Verbs,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback(help=_GUIDE)
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """What can be asked of the command itself."""


def _with_exit_codes(verb: Prepared) -> Callable[..., None]:
    """A verb that ends in one message and an exit code, if it is interrupted or memory or disk fail."""

    @functools.wraps(verb)
    def wrapped(*args: object, **kwargs: object) -> None:
        try:
            check_transformers()
            work = verb(*args, **kwargs)
            with watched():
                with stage("starting: PyTorch and transformers are loaded"):
                    import_module(_WITHOUT_USE_CASE.get(verb.__name__, f"ghostssm.workflows.{verb.__name__}"))

                raise_again()
                with terminable(), warnings_told():
                    work()
        except KeyboardInterrupt as stop:
            print_error(_ending("interrupted", str(stop)))
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except Terminated as stop:
            print_error(_ending("terminated", stop.message))
            raise typer.Exit(EXIT_TERMINATED) from None
        except (MemoryError, RuntimeError, OSError) as error:
            if is_out_of_memory(error):
                print_error(out_of_memory_message(error, kwargs))
            elif isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
                print_error(str(error))
            else:
                raise
            raise typer.Exit(_EXIT_FAILED) from None

    return wrapped


def _ending(what: str, next_step: str) -> str:
    return f"{what}. {next_step}" if next_step else f"{what}; nothing half-written is left."


def _help(verb: Prepared) -> str:
    """A verb's docstring up to its arguments, with its last paragraph as examples, line by line."""
    *paragraphs, examples = inspect_module.cleandoc(verb.__doc__ or "").partition("\n\nArgs:")[0].split("\n\n")
    text = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
    lines = "\n".join(f"$ {line}" for line in examples.splitlines())
    return f"{text}\n\n\bExamples:\n{lines}"


_VERBS: dict[str, tuple[Prepared, ...]] = {
    "Look, prune, try": (inspect.inspect, prune.prune, distill.distill, report.report, generate.generate),
    "Measure": (evaluate.evaluate, compare.compare, bench.bench),
    "Run it elsewhere": (export.export, verify.verify),
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
