"""``ghostssm evaluate``: a model's loss on a text."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ghostssm.cli.console import print_facts, print_json, print_table
from ghostssm.cli.parsing import AsJson, asks_for
from ghostssm.progress import silent
from ghostssm.report.screen import note, progress_reporter
from ghostssm.units import counted, plus_minus
from ghostssm.workflows.requests import EvaluateRequest

if TYPE_CHECKING:
    from ghostssm.text.windows import Windows
    from ghostssm.workflows.evaluate import EvaluateOutcome
    from ghostssm.workflows.harness import Score


@asks_for(EvaluateRequest)
def evaluate(request: EvaluateRequest, as_json: AsJson = False) -> None:
    """Measure a model's loss on a text, in float32. Or instead: how well it recalls, or its scores in known tasks.

    ghostssm evaluate mamba2-130m-n64 --against state-spaces/mamba2-130m
    ghostssm evaluate mamba2-130m-n64 --tasks lambada_openai piqa
    """
    from ghostssm.workflows.evaluate import evaluate as use_case

    for library in ("datasets", "huggingface_hub", "lm_eval") if request.tasks else ():
        logging.getLogger(library).setLevel(logging.ERROR)
    # What the harness and the tasks' own code print is not the result; the harness draws bars of its own.
    reporter = contextlib.nullcontext(silent) if request.tasks else progress_reporter()
    with contextlib.redirect_stdout(sys.stderr), reporter as progress:
        outcome = use_case(request, progress=progress, notify=note)
    if as_json:
        print_json(outcome.as_json())
    else:
        _print(outcome)


def _print(outcome: EvaluateOutcome) -> None:
    from ghostssm.evaluation.copying import CONTEXT, DISTANCE
    from ghostssm.workflows.evaluate import Copied, ExcessLoss, LastWords, TextLoss

    match outcome:
        case TextLoss(windows, evaluation):
            facts = [
                ("text", _windows_text(windows)),
                ("loss", f"{plus_minus(evaluation.loss, evaluation.standard_error)} nats per token"),
                ("perplexity", f"{evaluation.perplexity:.3f}"),
                ("bits per byte", f"{evaluation.bits_per_byte:.4f}"),
            ]
        case ExcessLoss(windows, dense, pruned):
            facts = [
                ("text", _windows_text(windows)),
                ("loss", f"{pruned.loss:.4f} nats per token, perplexity {pruned.perplexity:.3f}"),
                ("loss of the base", f"{dense.loss:.4f} nats per token, perplexity {dense.perplexity:.3f}"),
                ("excess loss", f"{outcome.measured.excess_text} nats per token"),
            ]
        case LastWords(text, recall):
            facts = [
                ("text", f"{text}, {counted(outcome.passages, 'passage')}"),
                ("loss of the last word", f"{recall.loss:.4f} nats"),
                ("accuracy", f"{recall.accuracy:.2%}"),
            ]
        case Copied(windows, seen):
            gains = {part: gain.text for part, gain in outcome.gains.items()}
            copied = f"each the last of {CONTEXT + 1} in a row that stood {DISTANCE} or more tokens before"
            facts = [
                ("text", _windows_text(windows)),
                ("copied tokens", f"{int(seen.copied.counts.sum())}, {copied}"),
                ("loss, copied", f"{seen.copied.mean:.4f} nats per token"),
                ("gain, copied", f"{gains['copied']} nats per token"),
                ("loss, elsewhere", f"{seen.elsewhere.mean:.4f} nats per token"),
                ("gain, elsewhere", f"{gains['elsewhere']} nats per token"),
            ]
        case _:
            _print_scores(outcome.scores)
            return
    print_facts(facts)


def _windows_text(windows: Windows) -> str:
    return f"{windows.text_name}, {len(windows)} windows of {windows.length} tokens"


def _print_scores(scores: Sequence[Score]) -> None:
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
