"""``ghostssm distill``: a pruned checkpoint learns from the model that it was pruned from."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ghostssm.cli import arguments, completion
from ghostssm.cli.console import note, print_facts, print_json, progress_reporter
from ghostssm.cli.requesting import requested

if TYPE_CHECKING:
    from ghostssm.workflows.distill_request import DistillOutcome

_SCALE_PANEL = "Scale"


def distill(
    student: Annotated[
        str,
        typer.Argument(
            metavar="STUDENT", help="A pruned checkpoint: folder or hub id.", autocompletion=completion.models
        ),
    ],
    teacher: Annotated[
        str,
        typer.Option(
            "--teacher", metavar="MODEL", help="The model that it was pruned from.", autocompletion=completion.models
        ),
    ],
    text: Annotated[
        str,
        typer.Option(
            "--text",
            metavar="TEXT",
            help="Text to learn on, read as it is needed; also ORG/NAME of a dataset on the hub.",
            autocompletion=completion.texts,
        ),
    ],
    output: Annotated[str, typer.Option("--output", metavar="DIR", help="Folder for the checkpoint.")],
    steps: Annotated[int | None, typer.Option("--steps", metavar="N", help="Steps to take; 300 if not given.")] = None,
    batch: Annotated[int, typer.Option("--batch", metavar="B", help="Windows per step, over all processes.")] = 8,
    window_length: arguments.WindowLength = 512,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            "--learning-rate",
            metavar="X",
            help="The largest one, after a warmup; it falls along a cosine.",
            rich_help_panel=arguments.HOW_PANEL,
        ),
    ] = None,
    train: Annotated[
        Literal["mixers", "small", "all"] | None,
        typer.Option(
            "--train",
            metavar="WHICH",
            help="Parameters that move: 'mixers', 'small' (no large matrix) or 'all'.",
            rich_help_panel=arguments.HOW_PANEL,
        ),
    ] = None,
    hidden_weight: Annotated[
        float,
        typer.Option(
            "--hidden-weight",
            metavar="X",
            help="Also learn the hidden states after every block, with this weight.",
            rich_help_panel=arguments.HOW_PANEL,
        ),
    ] = 0.0,
    bfloat16: Annotated[
        bool,
        typer.Option("--bfloat16", help="Compute in bfloat16; weights stay float32.", rich_help_panel=_SCALE_PANEL),
    ] = False,
    accumulate: Annotated[
        int,
        typer.Option(
            "--accumulate",
            metavar="N",
            help="Compute a batch in N parts, one after the other.",
            rich_help_panel=_SCALE_PANEL,
        ),
    ] = 1,
    checkpointing: Annotated[
        bool,
        typer.Option(
            "--checkpointing",
            help="Keep the inputs of blocks only, and compute their insides twice.",
            rich_help_panel=_SCALE_PANEL,
        ),
    ] = False,
    teacher_device: Annotated[
        str | None,
        typer.Option(
            "--teacher-device",
            metavar="NAME",
            help="Where the teacher computes, if not where the student does.",
            rich_help_panel=_SCALE_PANEL,
            autocompletion=completion.devices,
        ),
    ] = None,
    evaluate: Annotated[
        list[str] | None,
        typer.Option(
            "--evaluate",
            metavar="TEXT ...",
            help="Measure the loss on these texts, before and after; the first one's goes into the model card.",
            rich_help_panel=arguments.OUTPUT_PANEL,
            autocompletion=completion.texts,
        ),
    ] = None,
    text_windows: arguments.EvaluationWindows = None,
    save_minutes: Annotated[
        float,
        typer.Option(
            "--save-minutes",
            metavar="X",
            help="Keep the state in DIR.run every so many minutes.",
            rich_help_panel=arguments.OUTPUT_PANEL,
        ),
    ] = 10.0,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with the run whose state DIR.run holds, whatever ended it; from the beginning where there is "
            "none.",
            rich_help_panel=arguments.OUTPUT_PANEL,
        ),
    ] = False,
    log_to: Annotated[
        Literal["tensorboard", "wandb"] | None,
        typer.Option(
            "--log-to", metavar="NAME", help="Also log to tensorboard or wandb.", rich_help_panel=arguments.OUTPUT_PANEL
        ),
    ] = None,
    overwrite: arguments.Overwrite = False,
    seed: arguments.Seed = 42,
    tokenizer: arguments.Tokenizer = None,
    device: arguments.Device = "cpu",
    as_json: arguments.AsJson = False,
) -> None:
    """Let a pruned model learn the unpruned model's predictions, to give back what pruning took.

    ghostssm distill small --teacher MODEL --text wikitext2 --output healed
    ghostssm distill small --teacher MODEL --text ORG/NAME --output healed
    """
    given = locals()
    from ghostssm.workflows.distill import distill as carry_out
    from ghostssm.workflows.distill_request import DistillRequest

    begun = time.perf_counter()
    request = requested(DistillRequest, given, trained=train)
    with progress_reporter() as progress:
        outcome = carry_out(request, progress=progress, notify=note)
    _print(outcome, time.perf_counter() - begun, as_json)


def _print(outcome: DistillOutcome, seconds: float, as_json: bool) -> None:
    """Tell where the result is and what it is."""
    found = outcome.distillation
    if as_json:
        print_json({"output": str(outcome.written), **found.as_json(), "seconds": seconds})
        return
    facts = [
        ("written", str(Path(outcome.written))),
        ("trained", f"{found.steps} steps, {found.tokens:,} tokens of {found.text}; {found.ended}"),
        (
            f"excess loss, {found.held_out_windows} held-out windows",
            f"{found.curve[0].excess_text} -> {found.best.excess_text} nats per token (step {found.kept_step})",
        ),
    ]
    for before, after in zip(found.before, found.after, strict=True):
        facts.append((f"excess loss on {after.text}", f"{before.excess_text} -> {after.excess_text} nats per token"))
    print_facts([*facts, ("time", f"{seconds:.0f} s")])
