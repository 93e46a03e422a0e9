"""``ghostssm reproduce``: the paper's tables, published and measured."""

from __future__ import annotations

from typing import Annotated

import typer

from ghostssm.cli import arguments, completion
from ghostssm.cli.console import note, print_json, print_table, progress_reporter
from ghostssm.cli.requesting import requested
from ghostssm.errors import GhostError


def reproduce(
    output: Annotated[
        str,
        typer.Option(
            "--output", metavar="DIR", help="Folder for results.json and results.md. A run that stopped goes on there."
        ),
    ],
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--models",
            metavar="NAME ...",
            help="Names from mamba2-130m to mamba2-2.7b are fetched from the hub. NAME=FOLDER takes a local one; a "
            "folder alone has folders of these names. If not given: all five from the hub.",
            autocompletion=completion.published_models,
        ),
    ] = None,
    table: Annotated[
        list[str] | None,
        typer.Option(
            "--table",
            metavar="NAME ...",
            help="'sparsity': the 1.3b model cut by 10 to 90%. 'size': all models cut by half.",
            callback=arguments.tables_known,
            autocompletion=completion.tables,
        ),
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--methods",
            metavar="RECIPE ...",
            help="Methods or recipes, as for compare. If not given: those of the paper.",
            callback=arguments.recipes_known,
            autocompletion=completion.methods,
        ),
    ] = None,
    state_size: Annotated[
        list[int] | None,
        typer.Option("--state-size", metavar="N' ...", help="State sizes N' to prune to, in place of the paper's."),
    ] = None,
    calibration: arguments.CalibrationText = "",
    text: arguments.EvaluationText = "",
    windows: arguments.CalibrationWindows = 128,
    text_windows: arguments.EvaluationWindows = None,
    window_length: arguments.WindowLength = 2048,
    seed: arguments.Seed = 42,
    tokenizer: arguments.Tokenizer = None,
    device: arguments.Device = "cpu",
    as_json: arguments.AsJson = False,
) -> None:
    """Measure the paper's two tables on the published checkpoints, beside the published numbers.

    ghostssm reproduce --output reproduction --device cuda
    ghostssm reproduce --output quick --models mamba2-130m --windows 32
    """
    given = locals()
    from ghostssm.workflows.published import source
    from ghostssm.workflows.reproduce import reproduce as carry_out
    from ghostssm.workflows.reproduction import ReproduceRequest

    arguments.check_separated("--methods", methods)
    with progress_reporter() as progress:
        request = requested(ReproduceRequest, given, tables=table, state_sizes=state_size)
        outcome = carry_out(request, progress=progress, notify=note)
    if as_json:
        print_json({"output": output, **outcome.as_json()})
    else:
        for one in outcome.tables:
            print(one.title)
            print_table(one.headers, one.rows, text_columns=2)
            print()
        print(f"published: {source()}")
        print(f"written: {', '.join(map(str, outcome.written))}")
    if outcome.failures:
        listed = "".join(f"\n  - {' '.join(map(str, key))}: {reason}" for key, reason in outcome.failures.items())
        raise GhostError(
            f"{len(outcome.failures)} cells could not be measured; the same command tries them again:{listed}"
        )
