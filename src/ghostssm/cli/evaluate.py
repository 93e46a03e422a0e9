"""``ghostssm evaluate``: a model's loss on a text."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from ghostssm.cli import arguments, completion
from ghostssm.cli.console import note_if, print_facts, print_json, print_table, progress_reporter
from ghostssm.units import plus_minus

if TYPE_CHECKING:
    from ghostssm.checkpoint import Checkpoint
    from ghostssm.text.windows import Windows

_HARNESS_BATCH = 8


def evaluate(
    context: typer.Context,
    model: arguments.Model,
    text: arguments.EvaluationText = "",
    text_windows: arguments.EvaluationWindows = None,
    window_length: arguments.WindowLength = 2048,
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            metavar="BASE",
            help="Also measure BASE, the model that MODEL was pruned from, and the difference.",
            autocompletion=completion.models,
        ),
    ] = None,
    last_words: Annotated[
        str | None,
        typer.Option(
            "--last-words",
            metavar="TEXT",
            help="Instead: how well the last word of every line or row of TEXT is guessed, as in LAMBADA.",
            autocompletion=completion.texts,
        ),
    ] = None,
    copying: Annotated[
        bool,
        typer.Option("--copying", help="Instead: how well text is repeated that was read 256 or more tokens before."),
    ] = False,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--tasks",
            metavar="NAME ...",
            help="Instead: tasks of lm-evaluation-harness; pip install 'ghostssm[lm-eval]' first.",
        ),
    ] = None,
    include_path: Annotated[
        str | None, typer.Option("--include-path", metavar="FOLDER", help="With --tasks: more task files.")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit", help="With --tasks or --last-words: measure at most so many documents.", metavar="COUNT"
        ),
    ] = None,
    tokenizer: arguments.Tokenizer = None,
    device: arguments.Device = "cpu",
    stream: Annotated[
        bool,
        typer.Option(
            "--stream",
            help="Hold one layer's weights in memory at a time.",
            rich_help_panel=arguments.MEMORY_PANEL,
        ),
    ] = False,
    offload: arguments.Offload = None,
    as_json: arguments.AsJson = False,
) -> None:
    """Measure a model's loss on a text, in float32. Or instead: how well it recalls, or its scores in known tasks.

    ghostssm evaluate mamba2-130m-n64 --against state-spaces/mamba2-130m
    ghostssm evaluate mamba2-130m-n64 --tasks lambada_openai piqa
    """
    import torch

    import ghostssm
    from ghostssm.cli.text_loss import Measuring, print_excess, print_loss
    from ghostssm.errors import InputError
    from ghostssm.workflows.remarks import idle_gpu_remark

    if sum((last_words is not None, copying, bool(tasks))) > 1:
        raise InputError("Give at most one of --last-words, --copying and --tasks.")
    arguments.check_needed(context, "--tasks", bool(tasks), "include_path")
    arguments.check_needed(context, "--tasks or --last-words", bool(tasks) or last_words is not None, "limit")
    arguments.check_needed(context, "--stream", stream, "offload")
    arguments.check_unread(context, "--tasks", bool(tasks), "text", "text_windows", "against")
    arguments.check_unread(
        context, "--last-words", last_words is not None, "text", "text_windows", "window_length", "against"
    )
    arguments.check_unread(context, "--copying", copying, "against")
    if limit is not None and limit < 1:
        raise InputError(f"--limit is {limit}; expected at least 1 document or passage.")
    if stream and (last_words is not None or copying or tasks):
        raise InputError("--last-words, --copying and --tasks need the whole model in memory; leave out --stream.")
    if tasks:
        names = [name for value in tasks for name in value.split(",") if name]
        _evaluate_tasks(model, names, include_path, limit, window_length, tokenizer, device, as_json)
        return
    note_if(idle_gpu_remark(device))
    if last_words is not None:
        checkpoint = ghostssm.load(model, dtype=torch.float32, device=device, tokenizer=tokenizer)
        _evaluate_last_words(checkpoint, last_words, limit, as_json)
        return
    how = Measuring(text, text_windows, window_length, tokenizer, device, stream, offload)
    if copying:
        checkpoint = ghostssm.load(model, dtype=torch.float32, device=device, tokenizer=tokenizer)
        _evaluate_copying(checkpoint, how.windows(checkpoint.require_tokenizer()), as_json)
    elif against is not None:
        print_excess(model, against, how, as_json)
    else:
        print_loss(model, how, as_json)


def _evaluate_tasks(
    model: str,
    names: list[str],
    include_path: str | None,
    limit: int | None,
    max_length: int,
    tokenizer: str | None,
    device: str,
    as_json: bool,
) -> None:
    from ghostssm.checkpoint.loading import check_device
    from ghostssm.checkpoint.source import find_source
    from ghostssm.errors import InputError

    check_device(device)
    find_source(model, weights=False)  # before the data of every task is fetched
    for library in ("datasets", "huggingface_hub", "lm_eval"):
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        from ghostssm.workflows import harness
    except ModuleNotFoundError as error:
        raise InputError(
            f"--tasks needs lm-evaluation-harness, but the module {error.name!r} is not installed; "
            "install it with: pip install 'lm-eval[hf]'."
        ) from None

    # What the harness and the tasks' own code print is not the result.
    with contextlib.redirect_stdout(sys.stderr):
        loaded = harness.load_tasks(names, include_path)
        evaluated = harness.GhostLM(model, tokenizer, device=device, batch_size=_HARNESS_BATCH, max_length=max_length)
        scores = harness.run_tasks(evaluated, loaded, limit)
    if as_json:
        print_json([dataclasses.asdict(score) for score in scores])
        return
    several_filters = any(score.filter != "none" for score in scores)
    print_table(
        ["task", "metric", "value", "documents", "shots"],
        [
            [
                score.task,
                score.metric
                + (f" ({score.filter})" if several_filters else "")
                + {True: " (higher is better)", False: " (lower is better)", None: ""}[score.higher_is_better],
                f"{score.value:.4f}" + ("" if score.standard_error is None else f" ± {score.standard_error:.4f}"),
                "" if score.documents is None else str(score.documents),
                "" if score.shots is None else str(score.shots),
            ]
            for score in scores
        ],
        text_columns=2,
    )


def _evaluate_last_words(checkpoint: Checkpoint, text: str, limit: int | None, as_json: bool) -> None:
    from ghostssm.evaluation.recall import last_words
    from ghostssm.text.sources import read_passages

    passages = read_passages(text)[:limit]
    with progress_reporter() as progress:
        found = last_words(checkpoint.model, checkpoint.require_tokenizer(), passages, progress)
    if as_json:
        print_json({"text": text, "passages": len(passages), "loss": found.loss, "accuracy": found.accuracy})
        return
    print_facts(
        [
            ("text", f"{text}, {len(passages)} passages"),
            ("loss of the last word", f"{found.loss:.4f} nats"),
            ("accuracy", f"{found.accuracy:.2%}"),
        ]
    )


def _evaluate_copying(checkpoint: Checkpoint, windows: Windows, as_json: bool) -> None:
    from ghostssm.evaluation.copying import CONTEXT, DISTANCE, copying, copying_in_reach

    with progress_reporter() as progress:
        found = copying(checkpoint.model, windows, progress=progress)
        control = copying_in_reach(checkpoint.model, windows, progress=progress)
    gain = {part: getattr(control, part).excess_over(getattr(found, part)) for part in ("copied", "elsewhere")}
    if as_json:
        print_json(
            {"text": windows.text_name, "window_length": windows.length, "context": CONTEXT, "distance": DISTANCE}
            | {
                part: {
                    "tokens": int(getattr(found, part).counts.sum()),
                    "loss": getattr(found, part).mean,
                    "gain": gain[part].mean,
                    "gain_standard_error": gain[part].standard_error,
                }
                for part in gain
            }
        )
        return
    texts = {part: plus_minus(gain[part].mean, gain[part].standard_error) for part in gain}
    print_facts(
        [
            ("text", f"{windows.text_name}, {len(windows)} windows of {windows.length} tokens"),
            (
                "copied tokens",
                f"{int(found.copied.counts.sum())}, the end of {CONTEXT + 1} tokens read {DISTANCE} or more before",
            ),
            ("their loss", f"{found.copied.mean:.4f} nats per token"),
            ("gained by sight of these", texts["copied"]),
            ("loss elsewhere", f"{found.elsewhere.mean:.4f} nats per token"),
            ("gained by sight elsewhere", texts["elsewhere"]),
        ]
    )
