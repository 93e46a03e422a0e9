"""``ghostssm prune``: one model, one recipe, one size, to a checkpoint."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ghostssm.cli import arguments, completion
from ghostssm.cli.console import bytes_text, note, print_facts, print_json, progress_reporter
from ghostssm.cli.report import REPORT_FILE, check_drawable, write_page

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ghostssm import Description, Plan, Recipe, Windows
    from ghostssm.checkpoint import Checkpoint
    from ghostssm.evaluation.measurement import Measurement
    from ghostssm.methods.selection import Groups
    from ghostssm.report.record import Record


def prune(  # noqa: PLR0915  (one verb, read from top to bottom)
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
    from ghostssm.checkpoint import hub
    from ghostssm.checkpoint.saving import check_dialect
    from ghostssm.evaluation.measurement import Measurement, evaluate_in_float32
    from ghostssm.pruning import check_recipe
    from ghostssm.report.record import Record, WindowLosses

    begun = time.perf_counter()
    _check_stream_options(stream, offload, resume, dialect, max_excess_loss, untie, evaluate, with_report)
    if not stream:
        folder = ghostssm.OutputFolder(output, overwrite)
    recipe = _wanted_recipe(method, repair, refit, per_layer)
    described = ghostssm.describe(model)
    check_recipe(recipe, described.family)
    check_dialect(dialect, described.family, not recipe.stock, untie)
    if push_to_hub is not None:
        hub.check_hub_target(push_to_hub)
    if with_report:
        check_drawable()
    size = _wanted_size(described.layout.state_size, state_size, budget, max_excess_loss)
    suited = None
    if engine:
        tied = described.tied_head and not untie
        _check_dialects(engine, dialect)
        size, suited = _suited_sizes(described, recipe, groups, size, engine, tied)

    def windows_for(vocabulary: PreTrainedTokenizerBase) -> Windows:
        text = ghostssm.read_text(calibration, "calibration")
        cut = ghostssm.cut_windows(text, vocabulary, window_length, windows, seed)
        note(f"{recipe}: calibrating on {len(cut)} windows of {cut.length} tokens of {cut.text_name}")
        return cut

    measured, page = None, None
    if stream:
        assert size is not None
        plan = _prune_streamed(
            model, tokenizer, device, windows_for, recipe, size, output, groups, seed, overwrite, resume, offload
        )
        written = Path(output)
    else:
        checkpoint = ghostssm.load(model, device=device, tokenizer=tokenizer)
        vocabulary = checkpoint.require_tokenizer()
        held_out, dense = None, None
        if evaluate is not None:
            text = ghostssm.read_text(evaluate, "evaluation")
            held_out = ghostssm.cut_windows(text, vocabulary, window_length, text_windows)
            with progress_reporter() as progress:
                dense = evaluate_in_float32(checkpoint.model, held_out, progress)
        cut = windows_for(vocabulary)
        plan = _decide(checkpoint, cut, recipe, size, max_excess_loss, suited, groups, seed, multiple)
        record = _recorded(checkpoint, cut, described, plan, batch) if with_report else Record()
        smaller = dataclasses.replace(checkpoint, model=ghostssm.apply_plan(checkpoint.model, plan))
        if held_out is not None and dense is not None:
            with progress_reporter() as progress:
                after = evaluate_in_float32(smaller.model, held_out, progress)
            measured = Measurement.of(held_out, dense, after)
            record = dataclasses.replace(record, losses=WindowLosses.of(held_out, dense, {"pruned": after}))
        written = ghostssm.save(smaller, plan, folder, dialect=dialect, untie=untie, measured=measured)
        page = _write_report(written, record, with_report)
    address = None if push_to_hub is None else hub.push_to_hub(written, push_to_hub, private=private)
    _report(written, plan, measured, page, address, time.perf_counter() - begun, as_json)


def _recorded(
    checkpoint: Checkpoint, windows: Windows, described: Description, plan: Plan, batches: Sequence[int]
) -> Record:
    """What a report shows besides the plan, of the model before the plan is applied to it."""
    from ghostssm.report.measuring import decode_speeds, observe
    from ghostssm.report.record import Record

    with progress_reporter() as progress:
        observations = observe(checkpoint.model, windows, progress)
        return Record(observations, decode=decode_speeds(checkpoint.model, described, plan, batches, progress))


def _write_report(folder: Path, record: Record, with_page: bool) -> Path | None:
    """Write what was recorded, if anything, and the page, if it is wanted."""
    from ghostssm.checkpoint.output_file import OutputFile
    from ghostssm.report.building import checkpoint_report

    if with_page or record.losses is not None:
        record.write(folder)
    if not with_page:
        return None
    page = folder / REPORT_FILE
    write_page(OutputFile(page), checkpoint_report(folder))
    return page


def _report(
    written: Path,
    plan: Plan,
    measured: Measurement | None,
    page: Path | None,
    address: str | None,
    seconds: float,
    as_json: bool,
) -> None:
    import ghostssm

    found = ghostssm.describe(str(written))
    before = found.state_bytes(plan.state_size)
    after: int | list[int] = list(found.state_sizes) if plan.needs_own_class else plan.kept_state_size
    if as_json:
        print_json(
            {
                "output": str(written),
                "method": plan.method,
                "state_size": {"before": plan.state_size, "after": after},
                "state_bytes": {"before": before, "after": found.state_bytes()},
                "measured": None if measured is None else measured.as_json(),
                "report": None if page is None else str(page),
                "hub": address,
                "seconds": seconds,
            }
        )
        return
    facts = [
        ("written", str(written)),
        ("state size", f"{plan.state_size} -> {after if isinstance(after, int) else ' '.join(map(str, after))}"),
        ("state per sequence, fp32", f"{bytes_text(before)} -> {bytes_text(found.state_bytes())}"),
    ]
    if measured is not None:
        facts.append(("excess loss", f"{measured.excess_text} nats per token, on {measured.text}"))
    if page is not None:
        facts.append(("report", str(page)))
    if address is not None:
        facts.append(("uploaded", address))
    print_facts([*facts, ("time", f"{seconds:.0f} s")])


def _check_stream_options(
    stream: bool,
    offload: Path | None,
    resume: bool,
    dialect: str,
    max_excess_loss: float | None,
    untie: bool,
    evaluate: str | None,
    report: bool,
) -> None:
    from ghostssm.errors import InputError

    if not stream:
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise InputError("Several processes share a run with --stream only; add that, or start one process.")
        for option, given in (("--offload", offload is not None), ("--resume", resume)):
            if given:
                raise InputError(f"{option} works with --stream only; add that, or leave out {option}.")
        return
    if dialect != "transformers":
        raise InputError(
            f"The {dialect} dialect has all weights in one file, which --stream can't write; expected the transformers "
            "dialect."
        )
    for option, given in (("--untie", untie), ("--evaluate", evaluate is not None), ("--report", report)):
        if given:
            raise InputError(
                f"{option} needs the whole model in memory, which --stream avoids; leave out one of them. "
                "`ghostssm evaluate --stream` measures the loss afterwards."
            )
    if max_excess_loss is not None:
        raise InputError(
            "--max-excess-loss tries several sizes on the whole model, which --stream can't; give --state-size or "
            "--budget."
        )


def _prune_streamed(
    model: str,
    tokenizer: str | None,
    device: str,
    windows_for: Callable[[PreTrainedTokenizerBase], Windows],
    recipe: Recipe,
    size: int,
    output: str,
    groups: Groups,
    seed: int,
    overwrite: bool,
    resume: bool,
    offload: Path | None,
) -> Plan:
    import ghostssm
    from ghostssm.processes import Processes, own_device
    from ghostssm.pruning import check_streamable
    from ghostssm.run_folder import check_run_folder

    device = own_device(device)
    processes = Processes.join(device)
    processes.from_first(lambda: check_run_folder(Path(output), resume=resume, overwrite=overwrite))
    check_streamable(recipe, ghostssm.describe(model).family)
    checkpoint = ghostssm.stream(model, device=device, tokenizer=tokenizer, head=False)
    windows = windows_for(checkpoint.require_tokenizer())
    with progress_reporter() as progress:
        plan = ghostssm.prune_streamed(
            checkpoint,
            windows,
            recipe,
            size,
            output,
            groups=groups,
            seed=seed,
            overwrite=overwrite,
            resume=resume,
            offload=offload,
            processes=processes,
            progress=progress,
        )
    processes.leave()
    return plan


def _wanted_recipe(method: str | None, repair: bool | None, refit: int | None, per_layer: bool) -> Recipe:
    from ghostssm.recipe import DEFAULT_RECIPE, Recipe

    base = DEFAULT_RECIPE if method is None else Recipe.parse(method)
    return Recipe(
        base.method,
        base.repair if repair is None else repair,
        base.refit if refit is None else refit,
        base.per_layer or per_layer,
    )


def _wanted_size(limit: int, state_size: int | None, budget: float | None, max_excess_loss: float | None) -> int | None:
    """The state size, on average; None where a bound on the loss decides."""
    from ghostssm.errors import InputError
    from ghostssm.pruning import check_state_size

    if sum(option is not None for option in (state_size, budget, max_excess_loss)) != 1:
        raise InputError("Say how much to keep: give one of --state-size, --budget and --max-excess-loss.")
    if max_excess_loss is not None:
        if not max_excess_loss >= 0:
            raise InputError(f"--max-excess-loss is {max_excess_loss:g}; expected 0 or more nats per token.")
        return None
    if budget is not None:
        if not 0 < budget <= 1:
            raise InputError(f"--budget is {budget:g}; expected a share of the state above 0, up to 1.")
        return max(1, round(budget * limit))
    assert state_size is not None
    check_state_size(state_size, limit)
    return state_size


def _check_dialects(engines: Sequence[str], dialect: str) -> None:
    from ghostssm.engines import engines_named
    from ghostssm.errors import InputError

    for engine in engines_named(engines):
        if engine.dialect != dialect:
            raise InputError(f"{engine.name} reads the {engine.dialect} dialect; add --dialect {engine.dialect}.")


def _suited_sizes(
    described: Description, recipe: Recipe, groups: Groups, size: int | None, engines: Sequence[str], tied: bool
) -> tuple[int | None, Sequence[int] | None]:
    """The size nearest to the wanted one that the engines run; where a bound on the loss decides, all that they run."""
    from ghostssm.engines import advise, good_state_sizes, nearest_state_size
    from ghostssm.errors import InputError

    layout, family = described.layout, described.family
    if recipe.per_layer or not recipe.how.stock:
        for advice in advise(layout, family, engines=engines, own_class=True):
            if advice.level == "no":
                raise InputError(
                    f"{advice.engine} {advice.reason}, which {recipe} makes; leave --per-layer out and take a method "
                    "for stock classes, or leave the engine out."
                )
        return size, None
    if recipe.how.scope == "model" or (groups == "pooled" and layout.n_groups > 1):
        raise InputError(
            f"With --engine the state size has to be known beforehand, but {recipe} with --groups {groups} pads to the "
            "widest group or layer; expected --groups equal, and a method that cuts all layers alike."
        )
    if size is None:
        return None, good_state_sizes(layout, family, engines, tied_head=tied)
    chosen = nearest_state_size(size, layout, family, engines, tied_head=tied)
    if chosen != size:
        reasons = [
            f"{advice.engine}: {advice.level}, {advice.reason}"
            for advice in advise(layout.with_state_size(size), family, engines=engines)
            if advice.level != "runs"
        ]
        suits = f"the nearest that suits {' and '.join(engines)}"
        note(f"state size {chosen} in place of {size}, {suits} ({'; '.join(reasons)})")
    return chosen, None


def _decide(
    checkpoint: Checkpoint,
    windows: Windows,
    recipe: Recipe,
    size: int | None,
    max_excess_loss: float | None,
    suited: Sequence[int] | None,
    groups: Groups,
    seed: int,
    multiple: int,
) -> Plan:
    import ghostssm

    with progress_reporter() as progress:
        if size is not None:
            calibration = ghostssm.Calibration(checkpoint.model, windows)
            return calibration.plan(recipe, size, groups, seed, progress, multiple)
        assert max_excess_loss is not None
        return ghostssm.smallest_plan(
            checkpoint.model,
            windows,
            recipe,
            max_excess_loss,
            multiple=multiple,
            state_sizes=suited,
            groups=groups,
            seed=seed,
            progress=progress,
        )
