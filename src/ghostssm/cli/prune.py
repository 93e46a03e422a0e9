"""``ghostssm prune``: one model, one recipe, one size, to a checkpoint."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ghostssm.cli import arguments, completion
from ghostssm.cli.console import bytes_text, note, print_facts, print_json, print_table, progress_reporter
from ghostssm.cli.report import check_drawable
from ghostssm.cli.requesting import requested

if TYPE_CHECKING:
    from ghostssm import Description
    from ghostssm.pruning.recipe import Recipe
    from ghostssm.workflows.prune_request import PruneOutcome


def prune(
    model: arguments.Model,
    output: Annotated[str, typer.Option("--output", metavar="DIR", help="Folder for the checkpoint and the plan.")],
    state_size: Annotated[
        int | None,
        typer.Option(
            "--state-size", metavar="N'", help="Prune to this state size, from 1 to below the model's own size N."
        ),
    ] = None,
    budget: Annotated[
        float | None, typer.Option("--budget", metavar="SHARE", help="Or: keep this share of the state, such as 0.5.")
    ] = None,
    max_excess_loss: Annotated[
        float | None,
        typer.Option(
            "--max-excess-loss",
            metavar="NATS",
            help="Or: find the smallest state that raises the loss by at most so many nats per token. "
            "Some of the calibration windows are kept apart to measure that.",
        ),
    ] = None,
    state_bytes: Annotated[
        str | None,
        typer.Option(
            "--state-bytes",
            metavar="SHARE|SIZE",
            help="Or: find the state size and dtype that lose least within so many bytes per sequence: 1/8 of the "
            "dense float32 state, say, or 6MiB. Measured as with --max-excess-loss.",
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            help="The method that decides what stays, such as ghost, or a recipe: a method with recovery steps, such "
            "as ghost+repair, output+refit100+repair or balanced+per-layer. If not given, output+refit100+repair, "
            "which loses least among those whose result loads in the model's own class.",
            metavar="RECIPE",
            callback=arguments.recipes_known,
            autocompletion=completion.methods,
        ),
    ] = None,
    repair: Annotated[
        bool | None,
        typer.Option(
            "--repair/--no-repair",
            help="Add the step 'repair' to the recipe, or take it out. It fits the output projection to the smaller "
            "state.",
            rich_help_panel=arguments.HOW_PANEL,
        ),
    ] = None,
    refit: Annotated[
        int | None,
        typer.Option(
            "--refit",
            metavar="STEPS",
            callback=arguments.at_least(0),
            help="Add the step 'refit' to the recipe, with so many training steps per layer; 0 takes it out.",
            rich_help_panel=arguments.HOW_PANEL,
        ),
    ] = None,
    distill: Annotated[
        int | None,
        typer.Option(
            "--distill",
            metavar="STEPS",
            help="Steps in which the whole pruned model then learns from the unpruned one, on the calibration windows.",
            rich_help_panel=arguments.HOW_PANEL,
        ),
    ] = None,
    state_dtype: Annotated[
        str | None,
        typer.Option(
            "--state-dtype",
            metavar="NAME",
            help="Measure the pruned model with its state kept in this dtype, in which it is to be served: float32, "
            "bfloat16, float16, int8, fp8 or int4. Later verbs keep to it.",
            rich_help_panel=arguments.HOW_PANEL,
            autocompletion=completion.state_dtypes,
        ),
    ] = None,
    per_layer: Annotated[
        bool,
        typer.Option(
            "--per-layer",
            help="Let every layer have a state size of its own: larger where a cut costs more.",
            rich_help_panel=arguments.HOW_PANEL,
        ),
    ] = False,
    multiple: Annotated[
        int | None,
        typer.Option(
            "--multiple",
            callback=arguments.at_least(1),
            help="With --per-layer, --max-excess-loss or --state-bytes: try multiples of this number as sizes; 8 if "
            "not given.",
            rich_help_panel=arguments.HOW_PANEL,
            metavar="NUMBER",
        ),
    ] = None,
    engine: arguments.Engines = None,
    calibration: arguments.CalibrationText = "",
    windows: arguments.CalibrationWindows = 128,
    window_length: arguments.WindowLength = 2048,
    groups: arguments.Groups = "equal",
    dialect: Annotated[
        Literal["transformers", "mamba_ssm"],
        typer.Option(
            "--dialect",
            help="Format of the output: transformers or mamba_ssm.",
            rich_help_panel=arguments.OUTPUT_PANEL,
            metavar="NAME",
        ),
    ] = "transformers",
    untie: Annotated[
        bool,
        typer.Option(
            "--untie",
            help="Store the output head as a weight of its own even if it equals the embeddings; SGLang needs that.",
            rich_help_panel=arguments.OUTPUT_PANEL,
        ),
    ] = False,
    evaluate: Annotated[
        str | None,
        typer.Option(
            "--evaluate",
            metavar="TEXT",
            help="Also measure the loss on TEXT before and after, and write it into the model card.",
            rich_help_panel=arguments.OUTPUT_PANEL,
            autocompletion=completion.texts,
        ),
    ] = None,
    text_windows: arguments.EvaluationWindows = None,
    with_report: Annotated[
        bool,
        typer.Option(
            "--report",
            help="Also measure what the state does and how fast the model decodes, and write DIR/report.html; with "
            "--stream nothing is decoded. It takes the extra package: pip install 'ghostssm\\[report]'.",
            rich_help_panel=arguments.OUTPUT_PANEL,
        ),
    ] = False,
    batch: Annotated[
        list[int] | None,
        typer.Option(
            "--batch",
            metavar="SIZE ...",
            callback=arguments.at_least(1),
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
            help="With --push-to-hub: who sees a new repository; private if not given.",
            rich_help_panel=arguments.OUTPUT_PANEL,
        ),
    ] = None,
    overwrite: arguments.Overwrite = False,
    seed: arguments.Seed = 42,
    tokenizer: arguments.Tokenizer = None,
    device: arguments.Device = "cpu",
    stream: Annotated[
        bool,
        typer.Option(
            "--stream",
            help="Hold one layer's weights in memory at a time. The result is the same, in more files. Until the end, "
            "what is done is kept in DIR.run, so that --resume can go on with it.",
            rich_help_panel=arguments.MEMORY_PANEL,
        ),
    ] = False,
    offload: arguments.Offload = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="With --stream: go on with the run in DIR.run, whatever ended it. Without one, start anew.",
            rich_help_panel=arguments.MEMORY_PANEL,
        ),
    ] = False,
    as_json: arguments.AsJson = False,
) -> None:
    """Shrink the state of a model, from size N to N', and write a checkpoint that loads like the original.

    It needs one of --state-size, --budget, --max-excess-loss and --state-bytes. After the first layer it tells how
    long the rest takes. By default it reads 128 windows of 2048 tokens; with --windows 16 --method ghost a first
    result comes much sooner.

    ghostssm prune state-spaces/mamba2-130m --state-size 64 --output smaller
    ghostssm prune MODEL --state-bytes 1/4 --engine vllm --output smaller
    """
    given = locals()
    from ghostssm.workflows.prune import prune as carry_out
    from ghostssm.workflows.prune_request import PruneRequest

    begun = time.perf_counter()
    if with_report:
        check_drawable()
    recipe = str(_recipe(method, repair, refit, distill, per_layer))
    request = requested(PruneRequest, given, recipe=recipe, engines=engine, batches=batch, report=with_report)
    with progress_reporter() as progress:
        outcome = carry_out(request, progress=progress, notify=note)
    assert outcome.written is not None
    page = _page(outcome.written) if with_report else None
    _print(outcome, outcome.written, page, time.perf_counter() - begun, as_json)


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


def _print(outcome: PruneOutcome, written: Path, page: Path | None, seconds: float, as_json: bool) -> None:
    """Tell where the result is and what it is."""
    import ghostssm
    from ghostssm.checkpoint.left_out import LeftOut
    from ghostssm.checkpoint.manifest import Manifest
    from ghostssm.units import one_or_all

    plan, measured = outcome.plan, outcome.measured
    searched = None if plan.provenance is None else plan.provenance.search
    choice = None if plan.provenance is None else plan.provenance.choice
    found = ghostssm.describe(str(written))
    missing = Manifest.read(written).left_out or LeftOut()
    before = found.state_bytes(plan.state_size)
    after = one_or_all(plan.state_sizes)
    if as_json:
        print_json(
            {
                "output": str(written),
                "method": plan.method,
                "state_size": {"before": plan.state_size, "after": after},
                "state_bytes": {"before": before, "after": found.state_bytes()},
                "measured": None if measured is None else measured.as_json(),
                "searched": None if searched is None else searched.as_json(),
                "choice": None if choice is None else choice.as_json(),
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
        ("written", str(written)),
        ("state size", f"{plan.state_size} -> {after if isinstance(after, int) else ' '.join(map(str, after))}"),
        ("state per sequence, fp32", f"{bytes_text(before)} -> {bytes_text(found.state_bytes())}"),
    ]
    if searched is not None:
        facts.append(("excess loss", searched.text))
    if choice is not None:
        facts.append(("chosen", choice.text))
    if measured is not None:
        facts.append(("excess loss", f"{measured.excess_text} nats per token, on {measured.text}"))
    if page is not None:
        facts.append(("report", str(page)))
    if outcome.address is not None:
        facts.append(("uploaded", outcome.address))
    print_facts([*facts, ("time", f"{seconds:.0f} s")])
    if choice is not None:
        print()
        print_table(*choice.cells())
    if plan.state_dtype is not None:
        _print_serving(plan.state_dtype, found)


def _print_serving(state_dtype: str, found: Description) -> None:
    """How engines are told the dtype that the state was chosen to be kept in."""
    from ghostssm.cli.serving import engines_told, print_states

    print()
    print_states(engines_told(None, found), found.config, [state_dtype])
