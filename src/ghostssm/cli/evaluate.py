"""``ghostssm evaluate``: a model's loss on a text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ghostssm.cli import arguments
from ghostssm.cli.console import print_facts, print_json, progress_reporter

if TYPE_CHECKING:
    from ghostssm.checkpoint import Checkpoint


def evaluate(
    model: arguments.Model,
    text: arguments.EvaluationText = "wikitext2",
    text_windows: arguments.EvaluationWindows = None,
    window_length: arguments.WindowLength = 2048,
    last_words: Annotated[
        str | None,
        typer.Option("--last-words", metavar="TEXT", help="Instead: the last word of every line of TEXT, as LAMBADA."),
    ] = None,
    tokenizer: arguments.Tokenizer = None,
    device: arguments.Device = "cpu",
    stream: Annotated[
        bool,
        typer.Option("--stream", help="Hold one block of weights at a time, for models larger than memory."),
    ] = False,
    offload: arguments.Offload = None,
    as_json: arguments.AsJson = False,
) -> None:
    """Measure perplexity and bits per byte on a text, in float32; or recall, by the last words of passages.

    ghostssm evaluate mamba2-130m-n64 --text wikitext2
    """
    import torch

    import ghostssm
    from ghostssm.calibration.scratch import Scratch
    from ghostssm.errors import InputError

    if last_words is not None:
        if stream:
            raise InputError("--last-words decodes with the whole model; leave out --stream.")
        checkpoint = ghostssm.load(model, dtype=torch.float32, device=device, tokenizer=tokenizer)
        _evaluate_last_words(checkpoint, last_words, as_json)
        return
    if offload is not None and not stream:
        raise InputError("--offload works with --stream only; add that, or leave out --offload.")
    opened = (ghostssm.stream if stream else ghostssm.load)(
        model, dtype=torch.float32, device=device, tokenizer=tokenizer
    )
    cut = ghostssm.cut_windows(
        ghostssm.read_text(text, "evaluation"), opened.require_tokenizer(), window_length, text_windows
    )
    with progress_reporter() as progress:
        result = ghostssm.evaluate(
            opened.model if isinstance(opened, ghostssm.Checkpoint) else opened.blocks, cut, progress, Scratch(offload)
        )
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
