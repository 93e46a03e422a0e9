"""``ghostssm prune``: one model, one recipe, one size, to a checkpoint."""

from __future__ import annotations

import time
from typing import Annotated, Literal

import typer

from ghostssm.cli import arguments, completion
from ghostssm.cli.console import is_first_process, note_idle_gpu


def prune(
    context: typer.Context,
    model: arguments.Model,
    output: Annotated[str, typer.Option("--output", metavar="DIR", help="Folder for the checkpoint and the plan.")],
    state_size: Annotated[
        int | None, typer.Option("--state-size", metavar="R", help="The state size N' to prune to.")
    ] = None,
    budget: Annotated[
        float | None, typer.Option("--budget", metavar="F", help="Instead: keep this share of the state, 0 to 1.")
    ] = None,
    max_excess_loss: Annotated[
        float | None,
        typer.Option(
            "--max-excess-loss",
            metavar="X",
            help="Instead: the smallest state that loses at most X nats per token on held-out calibration windows.",
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            help="How it is decided what stays, as published: 'ghost', 'balanced' ... "
            "If not given, what loses least in a stock checkpoint: 'output', refitted and repaired.",
            metavar="NAME",
            autocompletion=completion.methods,
        ),
    ] = None,
    repair: Annotated[
        bool | None,
        typer.Option(
            "--repair/--no-repair",
            help="Fit out_proj to the pruned state, in closed form.",
            rich_help_panel=arguments.HOW_PANEL,
        ),
    ] = None,
    refit: Annotated[
        int | None,
        typer.Option(
            "--refit",
            metavar="N",
            min=0,
            help="Steps of local refit per layer; 0 for forward passes only.",
            rich_help_panel=arguments.HOW_PANEL,
        ),
    ] = None,
    per_layer: Annotated[
        bool,
        typer.Option(
            "--per-layer",
            help="Let layers have state sizes of their own, by what it costs them.",
            rich_help_panel=arguments.HOW_PANEL,
        ),
    ] = False,
    multiple: Annotated[
        int,
        typer.Option(
            "--multiple",
            min=1,
            help="Of sizes per layer, and of sizes that are searched.",
            rich_help_panel=arguments.HOW_PANEL,
            metavar="N",
        ),
    ] = 8,
    engine: arguments.Engines = None,
    calibration: arguments.CalibrationText = "wikitext2",
    windows: arguments.CalibrationWindows = 128,
    window_length: arguments.WindowLength = 2048,
    groups: arguments.Groups = "equal",
    dialect: Annotated[
        Literal["transformers", "mamba_ssm"],
        typer.Option(
            "--dialect",
            help="Of the output: transformers or mamba_ssm.",
            rich_help_panel=arguments.OUTPUT_PANEL,
            metavar="NAME",
        ),
    ] = "transformers",
    untie: Annotated[
        bool,
        typer.Option(
            "--untie",
            help="Store a tied head as lm_head.weight of its own, as SGLang needs it.",
            rich_help_panel=arguments.OUTPUT_PANEL,
        ),
    ] = False,
    evaluate: Annotated[
        str | None,
        typer.Option(
            "--evaluate",
            metavar="TEXT",
            help="Measure the loss on TEXT, dense and pruned, for the model card.",
            rich_help_panel=arguments.OUTPUT_PANEL,
            autocompletion=completion.texts,
        ),
    ] = None,
    text_windows: arguments.EvaluationWindows = None,
    with_report: Annotated[
        bool,
        typer.Option(
            "--report",
            help="Also measure what the state does and how fast it decodes, and write report.html into DIR.",
            rich_help_panel=arguments.OUTPUT_PANEL,
        ),
    ] = False,
    batch: Annotated[
        list[int],
        typer.Option(
            "--batch",
            metavar="B ...",
            min=1,
            help="With --report: batch sizes to decode at.",
            rich_help_panel=arguments.OUTPUT_PANEL,
        ),
    ] = [1, 8, 32],  # noqa: B006  (read only)
    push_to_hub: Annotated[
        str | None,
        typer.Option(
            "--push-to-hub",
            metavar="ORG/NAME",
            help="Upload what was written to the hub.",
            rich_help_panel=arguments.OUTPUT_PANEL,
        ),
    ] = None,
    private: Annotated[
        bool,
        typer.Option(
            "--private/--public",
            help="Of a repository that --push-to-hub makes.",
            rich_help_panel=arguments.OUTPUT_PANEL,
        ),
    ] = True,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Replace an output folder that is not empty.", rich_help_panel=arguments.OUTPUT_PANEL
        ),
    ] = False,
    seed: arguments.Seed = 42,
    tokenizer: arguments.Tokenizer = None,
    device: arguments.Device = "cpu",
    stream: Annotated[
        bool,
        typer.Option(
            "--stream",
            help="Hold one block of weights at a time, for models larger than memory. The result is the same, in more "
            "files. What is done is kept in DIR.run until the end, for --resume.",
            rich_help_panel=arguments.MEMORY_PANEL,
        ),
    ] = False,
    offload: arguments.Offload = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="With --stream: go on with the run whose state DIR.run holds, whatever ended it; from the beginning "
            "where there is none.",
            rich_help_panel=arguments.MEMORY_PANEL,
        ),
    ] = False,
    as_json: arguments.AsJson = False,
) -> None:
    """Prune a model's state and write a checkpoint that loads like the original.

    ghostssm prune state-spaces/mamba2-130m --state-size 64 --output smaller
    ghostssm prune MODEL --max-excess-loss 0.02 --engine vllm --output smaller
    """
    import ghostssm
    from ghostssm.checkpoint.hub import check_hub_target
    from ghostssm.checkpoint.saving import check_dialect
    from ghostssm.cli.pruning import in_memory, sizes, streamed
    from ghostssm.cli.pruning.job import Job, wanted_recipe
    from ghostssm.cli.pruning.outcome import print_outcome
    from ghostssm.cli.report import check_drawable
    from ghostssm.files.output_folder import check_apart
    from ghostssm.pruning.feasibility import check_original, check_recipe

    begun = time.perf_counter()
    check_apart(output, model)
    arguments.check_needed(context, "--evaluate", evaluate is not None, "text_windows")
    arguments.check_needed(context, "--report", with_report, "batch")
    arguments.check_needed(context, "--push-to-hub", push_to_hub is not None, "private")
    arguments.check_needed(context, "--stream", stream, "offload", "resume")
    if stream:
        streamed.check_streamed_options(dialect, max_excess_loss, untie, with_report)
    else:
        streamed.check_not_shared()
        folder = ghostssm.OutputFolder(output, overwrite)
    recipe = wanted_recipe(method, repair, refit, per_layer)
    sizes_vary = recipe.per_layer or max_excess_loss is not None
    arguments.check_needed(context, "--per-layer or --max-excess-loss", sizes_vary, "multiple")
    described = ghostssm.describe(model)
    check_original(described.is_stock)
    check_recipe(recipe, described.family)
    check_dialect(dialect, described.family, not recipe.stock, untie)
    if push_to_hub is not None:
        check_hub_target(push_to_hub)
    if with_report:
        check_drawable()
    target = sizes.wanted_target(described.layout.state_size, state_size, budget, max_excess_loss)
    if engine:
        sizes.check_engine_dialects(engine, dialect)
        target = sizes.suited_target(
            target, described, recipe, groups, engine, described.tied_head and not untie, multiple
        )
    sizes.check_smaller(target, described.layout.state_size)
    job = Job(
        model=model,
        tokenizer=tokenizer,
        device=device,
        description=described,
        recipe=recipe,
        target=target,
        groups=groups,
        multiple=multiple,
        seed=seed,
        calibration=calibration,
        calibration_windows=windows,
        evaluation=evaluate,
        evaluation_windows=text_windows,
        window_length=window_length,
        output=output,
        overwrite=overwrite,
    )
    note_idle_gpu(device)
    if stream:
        outcome = streamed.prune_streamed(job, resume, offload)
    else:
        outcome = in_memory.prune_in_memory(
            job, folder, dialect, untie=untie, report_batches=batch if with_report else ()
        )
    address = None
    if push_to_hub is not None and is_first_process():
        address = ghostssm.push_to_hub(outcome.written, push_to_hub, private=private)
    print_outcome(outcome, address, time.perf_counter() - begun, as_json)
