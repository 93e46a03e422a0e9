"""``ghostssm evaluate``: a model's loss on a text."""

from __future__ import annotations

from ghostssm.cli import arguments
from ghostssm.cli.console import print_facts, print_json, progress_reporter


def evaluate(
    model: arguments.Model,
    text: arguments.EvaluationText = "wikitext2",
    text_windows: arguments.EvaluationWindows = None,
    window_length: arguments.WindowLength = 2048,
    tokenizer: arguments.Tokenizer = None,
    device: arguments.Device = "cpu",
    as_json: arguments.AsJson = False,
) -> None:
    """Measure perplexity and bits per byte on a text, in float32.

    ghostssm evaluate mamba2-130m-n64 --text wikitext2
    """
    import torch

    import ghostssm

    checkpoint = ghostssm.load(model, dtype=torch.float32, device=device, tokenizer=tokenizer)
    cut = ghostssm.cut_windows(
        ghostssm.read_text(text, "evaluation"), checkpoint.require_tokenizer(), window_length, text_windows
    )
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
