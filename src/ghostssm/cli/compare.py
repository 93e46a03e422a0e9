"""``ghostssm compare``: methods and state sizes side by side."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from ghostssm.cli import arguments, completion
from ghostssm.cli.console import note, print_json, print_table, progress_reporter
from ghostssm.cli.report import page_to_write
from ghostssm.cli.requesting import requested


def compare(
    model: arguments.Model,
    state_size: arguments.StateSizes = None,
    state_bytes: Annotated[
        list[str] | None,
        typer.Option(
            "--state-bytes",
            metavar="SHARE|SIZE ...",
            help="Or: for every method, the state size and dtype that lose least within so many bytes per sequence, as "
            "prune --state-bytes chooses them: 1/4 1/8, say, or 6MiB.",
        ),
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--methods",
            metavar="RECIPE ...",
            help="Methods or recipes to compare, such as ghost, output+repair or balanced+per-layer. A recipe is a "
            "method with recovery steps. If not given: all methods that the model can take, without steps.",
            callback=arguments.recipes_known,
            autocompletion=completion.methods,
        ),
    ] = None,
    calibration: arguments.CalibrationText = "",
    text: arguments.EvaluationText = "",
    windows: arguments.CalibrationWindows = 128,
    text_windows: arguments.EvaluationWindows = None,
    window_length: arguments.WindowLength = 2048,
    batch: Annotated[
        list[int],
        typer.Option(
            "--batch", metavar="SIZE ...", callback=arguments.at_least(1), help="Batch sizes to measure decoding at."
        ),
    ] = [1, 32],  # noqa: B006  (read only)
    groups: arguments.Groups = "equal",
    state_dtype: arguments.StateDtypes = ["float32"],  # noqa: B006  (read only)
    state_rounding: arguments.StateRounding = "nearest",
    seed: arguments.Seed = 42,
    report: Annotated[
        str | None,
        typer.Option(
            "--report", metavar="FILE", help="Also write an HTML page; pip install 'ghostssm\\[report]' first."
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FILE if it is there.")] = False,
    tokenizer: arguments.Tokenizer = None,
    device: arguments.Device = "cpu",
    as_json: arguments.AsJson = False,
) -> None:
    """Prune by several methods to several state sizes, in memory, and print one table of loss, state and speed.

    ghostssm compare MODEL --state-size 96 64 32 --methods ghost output+repair
    ghostssm compare MODEL --state-bytes 1/4 1/8 --methods ghost balanced
    """
    given = locals()
    import ghostssm
    from ghostssm.workflows.comparison import comparison_cells

    arguments.check_separated("--methods", methods)
    arguments.check_separated("--state-bytes", state_bytes)
    arguments.check_separated("--state-dtype", state_dtype)
    page = page_to_write(report, overwrite)
    request = requested(
        ghostssm.CompareRequest,
        given,
        state_sizes=state_size,
        batches=batch,
        report=page is not None,
        state_dtypes=state_dtype,
    )
    with progress_reporter() as progress:
        result = ghostssm.compare(request, progress=progress, notify=note)
    if page is not None:
        from ghostssm.report.building import comparison_report
        from ghostssm.report.page import write_page

        write_page(page, comparison_report(result))
        note(f"report: {page.path}")
    for row in result.rows:
        if row.distilled_tokens:
            note(
                f"{row.method} saw gradients through the whole model, on {row.distilled_tokens:,} tokens "
                f"(N' = {row.state_size})"
            )
    if as_json:
        print_json([dataclasses.asdict(row) for row in result.rows])
        return
    print_table(*comparison_cells(result.rows))
    if batch:
        note("tok/s: measured once per state size and model class; ± is half of the range over the rounds")
    if any(row.stored_state_size != row.state_size for row in result.rows):
        note("(in brackets: the state size stored, padded to the widest group and layer, or whole)")
