"""``ghostssm evaluate``: a model's loss on a text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ghostssm.cli import arguments
from ghostssm.cli.console import print_facts, print_json, progress_reporter

if TYPE_CHECKING:
    from ghostssm.checkpoint import Checkpoint
    from ghostssm.data.windows import Windows


def evaluate(
    model: arguments.Model,
    text: arguments.EvaluationText = "wikitext2",
    text_windows: arguments.EvaluationWindows = None,
    window_length: arguments.WindowLength = 2048,
    last_words: Annotated[
        str | None,
        typer.Option("--last-words", metavar="TEXT", help="Instead: the last word of every line of TEXT, as LAMBADA."),
    ] = None,
    copying: Annotated[
        bool, typer.Option("--copying", help="Instead: tokens that repeat what was read 256 or more tokens before.")
    ] = False,
    tokenizer: arguments.Tokenizer = None,
    device: arguments.Device = "cpu",
    as_json: arguments.AsJson = False,
) -> None:
    """Measure perplexity and bits per byte on a text, in float32; or recall: last words, copying.

    ghostssm evaluate mamba2-130m-n64 --text wikitext2
    """
    import torch

    import ghostssm

    checkpoint = ghostssm.load(model, dtype=torch.float32, device=device, tokenizer=tokenizer)
    if last_words is not None:
        _evaluate_last_words(checkpoint, last_words, as_json)
        return
    cut = ghostssm.cut_windows(
        ghostssm.read_text(text, "evaluation"), checkpoint.require_tokenizer(), window_length, text_windows
    )
    if copying:
        _evaluate_copying(checkpoint, cut, as_json)
        return
    with progress_reporter() as progress:
        result = ghostssm.evaluate(checkpoint.model, cut, progress)
    if as_json:
        print_json(
            {
                "text": cut.text_name,
                "window_length": cut.length,
                "loss": result.loss,
                "perplexity": result.perplexity,
                "bits_per_byte": result.bits_per_byte,
                "window_losses": result.losses.tolist(),
            }
        )
        return
    print_facts(
        [
            ("text", f"{cut.text_name}, {len(cut)} windows of {cut.length} tokens"),
            ("loss", f"{result.loss:.4f} nats per token"),
            ("perplexity", f"{result.perplexity:.3f}"),
            ("bits per byte", f"{result.bits_per_byte:.4f}"),
        ]
    )


def _evaluate_last_words(checkpoint: Checkpoint, text: str, as_json: bool) -> None:
    import ghostssm
    from ghostssm.evaluation.recall import last_words

    passages = [line for line in ghostssm.read_text(text, "evaluation").joined.splitlines() if line.strip()]
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
    texts = {part: f"{gain[part].mean:+.4f} ± {gain[part].standard_error:.4f}" for part in gain}
    print_facts(
        [
            ("text", f"{windows.text_name}, {len(windows)} windows of {windows.length} tokens"),
            (
                "copied tokens",
                f"{int(found.copied.counts.sum())}, the end of {CONTEXT + 1} tokens read {DISTANCE} or more before",
            ),
            ("their loss", f"{found.copied.mean:.4f} nats per token"),
            ("without sight of these", texts["copied"]),
            ("loss elsewhere", f"{found.elsewhere.mean:.4f} nats per token"),
            ("with as short a sight", texts["elsewhere"]),
        ]
    )
