"""``ghostssm prune``: one model, one recipe, one size, to a checkpoint."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ghostssm.cli import arguments, completion
from ghostssm.cli.console import bytes_text, note, print_facts, print_json, progress_reporter
from ghostssm.cli.report import check_drawable

if TYPE_CHECKING:
    from ghostssm.pruning.recipe import Recipe
    from ghostssm.workflows.prune_request import PruneOutcome


def prune(
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
    distill: Annotated[
        int | None,
        typer.Option(
            "--distill",
            metavar="N",
            min=1,
            help="Steps in which the whole pruned model then learns from the unpruned one, on the calibration windows.",
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
        int | None,
        typer.Option(
            "--multiple",
            min=1,
            help="Of sizes per layer, and of sizes that are searched; 8 if not given.",
            rich_help_panel=arguments.HOW_PANEL,
            metavar="N",
        ),
    ] = None,
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
        list[int] | None,
        typer.Option(
            "--batch",
            metavar="B ...",
            min=1,
            help="With --report: batch sizes to decode at; 1, 8 and 32 if not given.",
            rich_help_panel=arguments.OUTPUT_PANEL,
        ),
    ] = None,
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
        bool | None,
        typer.Option(
            "--private/--public",
            help="Of a repository that --push-to-hub makes; private if not given.",
            rich_help_panel=arguments.OUTPUT_PANEL,
        ),
    ] = None,
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
    from ghostssm.workflows.prune import prune as carry_out
    from ghostssm.workflows.prune_request import PruneRequest

    begun = time.perf_counter()
    if with_report:
        check_drawable()
    request = PruneRequest(
        model=model,
        output=output,
        state_size=state_size,
        budget=budget,
        max_excess_loss=max_excess_loss,
        recipe=str(_recipe(method, repair, refit, distill, per_layer)),
        multiple=multiple,
        engines=tuple(engine or ()),
        groups=groups,
        calibration=calibration,
        windows=windows,
        window_length=window_length,
        seed=seed,
        evaluate=evaluate,
        text_windows=text_windows,
        dialect=dialect,
        untie=untie,
        report=with_report,
        batches=None if batch is None else tuple(batch),
        push_to_hub=push_to_hub,
        private=private,
        tokenizer=tokenizer,
        device=device,
        stream=stream,
        offload=offload,
        resume=resume,
        overwrite=overwrite,
    )
    with progress_reporter() as progress:
        outcome = carry_out(request, progress=progress, notify=note)
    page = _page(outcome.written) if with_report else None
    _print(outcome, page, time.perf_counter() - begun, as_json)


def _page(folder: Path) -> Path:
    """Draw what the run measured."""
    from ghostssm.checkpoint.manifest import PAGE_FILE
    from ghostssm.files.output_file import OutputFile
    from ghostssm.report.building import checkpoint_report
    from ghostssm.report.page import write_page

    page = folder / PAGE_FILE
    write_page(OutputFile(page), checkpoint_report(folder))
    return page


def _recipe(method: str | None, repair: bool | None, refit: int | None, distill: int | None, per_layer: bool) -> Recipe:
    """The recipe that a method's name and the options beside it make together."""
    from ghostssm.pruning.recipe import DEFAULT_RECIPE, Recipe
    from ghostssm.recovery import Step

    base = DEFAULT_RECIPE if method is None else Recipe.parse(method)
    steps = list(base.steps)
    if refit is not None:
        steps = [step for step in steps if step.name != "refit"]
        steps[:0] = [Step("refit", refit)] if refit else []
    if repair is not None:
        steps = [step for step in steps if step.name != "repair"] + [Step("repair")] * repair
    if distill is not None:
        steps = [step for step in steps if step.name != "distill"] + [Step("distill", distill)]
    return Recipe(base.method, tuple(steps), base.per_layer or per_layer)


def _print(outcome: PruneOutcome, page: Path | None, seconds: float, as_json: bool) -> None:
    """Tell where the result is and what it is."""
    import ghostssm
    from ghostssm.checkpoint.left_out import LeftOut
    from ghostssm.checkpoint.manifest import Manifest
    from ghostssm.units import one_or_all

    plan, measured = outcome.plan, outcome.measured
    searched = None if plan.provenance is None else plan.provenance.search
    found = ghostssm.describe(str(outcome.written))
    missing = Manifest.read(outcome.written).left_out or LeftOut()
    before = found.state_bytes(plan.state_size)
    after = one_or_all(plan.state_sizes)
    if as_json:
        print_json(
            {
                "output": str(outcome.written),
                "method": plan.method,
                "state_size": {"before": plan.state_size, "after": after},
                "state_bytes": {"before": before, "after": found.state_bytes()},
                "measured": None if measured is None else measured.as_json(),
                "searched": None if searched is None else searched.as_json(),
                "left_out": missing.as_json(),
                "report": None if page is None else str(page),
                "hub": outcome.address,
                "seconds": seconds,
            }
        )
        return
    for text in missing.notes:
        note(f"note: {text}")
    facts = [
        ("written", str(outcome.written)),
        ("state size", f"{plan.state_size} -> {after if isinstance(after, int) else ' '.join(map(str, after))}"),
        ("state per sequence, fp32", f"{bytes_text(before)} -> {bytes_text(found.state_bytes())}"),
    ]
    if searched is not None:
        facts.append(("excess loss", searched.text))
    if measured is not None:
        facts.append(("excess loss", f"{measured.excess_text} nats per token, on {measured.text}"))
    if page is not None:
        facts.append(("report", str(page)))
    if outcome.address is not None:
        facts.append(("uploaded", outcome.address))
    print_facts([*facts, ("time", f"{seconds:.0f} s")])
