"""``ghostssm compare``: methods and state sizes side by side."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from ghostssm.cli import arguments, completion
from ghostssm.cli.console import note, note_if, print_json, print_table, progress_reporter
from ghostssm.cli.report import check_drawable


def compare(
    context: typer.Context,
    model: arguments.Model,
    state_size: arguments.StateSizes,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--methods",
            metavar="NAME ...",
            help="Methods to compare, each with its repairs: ghost, output+repair, output+refit60+repair, "
            "balanced+per-layer ... All methods that the model's family has, without repairs, if not given.",
            autocompletion=completion.methods,
        ),
    ] = None,
    calibration: arguments.CalibrationText = "wikitext2",
    text: arguments.EvaluationText = "wikitext2",
    windows: arguments.CalibrationWindows = 128,
    text_windows: arguments.EvaluationWindows = None,
    window_length: arguments.WindowLength = 2048,
    batch: Annotated[
        list[int], typer.Option("--batch", metavar="B ...", min=1, help="Batch sizes at which to measure decoding.")
    ] = [1, 32],  # noqa: B006  (read only)
    groups: arguments.Groups = "equal",
    seed: arguments.Seed = 42,
    report: Annotated[
        str | None, typer.Option("--report", metavar="FILE", help="Also write the comparison as an HTML page.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FILE if it is there.")] = False,
    tokenizer: arguments.Tokenizer = None,
    device: arguments.Device = "cpu",
    as_json: arguments.AsJson = False,
) -> None:
    """Prune by several methods to several sizes and print one table; only a report is written, on demand.

    ghostssm compare MODEL --state-size 96 64 32 --methods ghost output+repair
    ghostssm compare MODEL --state-size 64 --calibration a.txt --text b.txt
    """
    import torch

    import ghostssm
    from ghostssm.evaluation.roofline import measure_machine
    from ghostssm.files.output_file import OutputFile
    from ghostssm.pruning.feasibility import check_original, check_recipe, check_state_size, methods_for
    from ghostssm.workflows.compare import comparison_cells
    from ghostssm.workflows.observing import observe
    from ghostssm.workflows.remarks import idle_gpu_remark, same_text_remark

    arguments.check_separated("--methods", methods)
    recipes = [ghostssm.Recipe.parse(name) for name in methods or ()]
    arguments.check_needed(context, "--report", report is not None, "overwrite")
    file = None
    if report is not None:
        file = OutputFile(report, overwrite)
        check_drawable()
    described = ghostssm.describe(model)
    check_original(described.is_stock)
    names = methods or list(methods_for(described.family))
    for recipe in recipes:
        check_recipe(recipe, described.family)
    limit = described.layout.state_size
    for size in state_size:
        check_state_size(size, limit)
    note_if(idle_gpu_remark(device))
    checkpoint = ghostssm.load(model, dtype=torch.float32, device=device, tokenizer=tokenizer)
    vocabulary = checkpoint.require_tokenizer()
    calibration_windows = ghostssm.cut_windows(
        ghostssm.read_text(calibration, "calibration"), vocabulary, window_length, windows, seed
    )
    test_text = ghostssm.read_text(text, "evaluation")
    test_windows = ghostssm.evaluation_windows(test_text, vocabulary, window_length, text_windows)
    note_if(same_text_remark(calibration_windows, test_windows))
    note(
        f"windows of {window_length} tokens: calibrating on {len(calibration_windows)} of "
        f"{calibration_windows.text_name}, measuring on {len(test_windows)} of {test_windows.text_name}"
    )
    with progress_reporter() as progress:
        result = ghostssm.compare(
            checkpoint,
            calibration_windows,
            test_windows,
            names,
            state_size,
            groups=groups,
            seed=seed,
            batches=batch,
            progress=progress,
        )
        if file is not None:
            observations = observe(checkpoint.model, calibration_windows, progress)
    if file is not None:
        from ghostssm.report.building import comparison_report
        from ghostssm.report.page import write_page

        settings = {
            "ghostssm": ghostssm.__version__,
            "model": model,
            "methods": names,
            "state_sizes": state_size,
            "groups": groups,
            "seed": seed,
            "batches": batch,
            "device": device,
        }
        for role, part in (("calibration", calibration_windows), ("evaluation", test_windows)):
            settings[role] = {"text": part.text_name, "windows": len(part), "window_length": part.length}
        machine = measure_machine(batch, device)
        write_page(file, comparison_report(result, described, test_windows, settings, observations, machine))
        note(f"report: {file.path}")
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
    if any(row.stored_state_size != row.state_size for row in result.rows):
        note("(in brackets: the state size stored, padded to the widest group and layer, or whole)")
