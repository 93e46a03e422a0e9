"""The loss on a text that ``ghostssm evaluate`` prints: of one model, or of two on the same windows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

import ghostssm
from ghostssm.calibration.scratch import Scratch
from ghostssm.checkpoint.loading import check_device, model_config
from ghostssm.checkpoint.tokenizer import load_tokenizer, required
from ghostssm.cli.console import note, print_facts, print_json, progress_reporter
from ghostssm.errors import InputError
from ghostssm.evaluation.measurement import measurement_of
from ghostssm.units import plus_minus


@dataclass(frozen=True)
class Measuring:
    """What a loss is measured on, and how models are opened for it.

    Attributes:
        text: TEXT, of which ``text_windows`` windows are drawn; None for all.
        stream: hold one block of weights at a time; ``offload`` is where what grows with the windows goes then.
    """

    text: str
    text_windows: int | None
    window_length: int
    tokenizer: str | None
    device: str
    stream: bool
    offload: Path | None

    def opened(self, model: str) -> ghostssm.Checkpoint | ghostssm.StreamedCheckpoint:
        """A model in float32, in memory or streamed."""
        open_model = ghostssm.stream if self.stream else ghostssm.load
        return open_model(model, dtype=torch.float32, device=self.device, tokenizer=self.tokenizer)

    def windows(self, vocabulary: PreTrainedTokenizerBase) -> ghostssm.Windows:
        """The windows that a tokenizer makes of the text."""
        text = ghostssm.read_text(self.text, "evaluation")
        return ghostssm.evaluation_windows(text, vocabulary, self.window_length, self.text_windows)

    def evaluation(
        self, opened: ghostssm.Checkpoint | ghostssm.StreamedCheckpoint, windows: ghostssm.Windows
    ) -> ghostssm.Evaluation:
        """The loss of an opened model."""
        measured = opened.model if isinstance(opened, ghostssm.Checkpoint) else opened.blocks
        with progress_reporter() as progress:
            return ghostssm.evaluate(measured, windows, progress, Scratch(self.offload))


def print_loss(model: str, how: Measuring, as_json: bool) -> None:
    """Measure one model and tell its loss."""
    opened = how.opened(model)
    windows = how.windows(opened.require_tokenizer())
    found = how.evaluation(opened, windows)
    if as_json:
        print_json(
            {
                "text": windows.text_name,
                "window_length": windows.length,
                "loss": found.loss,
                "standard_error": found.standard_error,
                "perplexity": found.perplexity,
                "bits_per_byte": found.bits_per_byte,
                "window_losses": found.losses.tolist(),
            }
        )
        return
    print_facts(
        [
            ("text", _windows_text(windows)),
            ("loss", f"{plus_minus(found.loss, found.standard_error)} nats per token"),
            ("perplexity", f"{found.perplexity:.3f}"),
            ("bits per byte", f"{found.bits_per_byte:.4f}"),
        ]
    )


def print_excess(model: str, base: str, how: Measuring, as_json: bool) -> None:
    """Measure a model and its base on the same windows, one after the other, and tell the paired difference.

    Raises:
        InputError: the models differ in their vocabulary, or their tokenizers make other tokens of the text.
    """
    check_device(how.device)
    windows = _shared_windows(model, base, how)
    note(f"measuring {model}")
    found = how.evaluation(how.opened(model), windows)
    note(f"measuring {base}")
    dense = how.evaluation(how.opened(base), windows)
    measured = measurement_of(windows, dense, found)
    if as_json:
        print_json(
            {
                **measured.as_json(),
                "dense_perplexity": dense.perplexity,
                "pruned_perplexity": found.perplexity,
                "dense_window_losses": dense.losses.tolist(),
                "pruned_window_losses": found.losses.tolist(),
            }
        )
        return
    print_facts(
        [
            ("text", _windows_text(windows)),
            ("loss", f"{found.loss:.4f} nats per token, perplexity {found.perplexity:.3f}"),
            ("loss of the base", f"{dense.loss:.4f} nats per token, perplexity {dense.perplexity:.3f}"),
            ("excess loss", f"{measured.excess_text} nats per token"),
        ]
    )


def _shared_windows(model: str, base: str, how: Measuring) -> ghostssm.Windows:
    """The windows of both models; from their configs and tokenizers only, so that a mismatch shows before the work."""
    cut, sizes = [], []
    for spec in (model, base):
        source = ghostssm.find_source(spec, weights=False)
        config = model_config(source)
        sizes.append(config.vocab_size)
        cut.append(how.windows(required(load_tokenizer(source, config, how.tokenizer), source)))
    if sizes[0] != sizes[1]:
        raise InputError(
            f"{model} has a vocabulary of {sizes[0]} tokens, {base} one of {sizes[1]}; expected the model that "
            f"{model} was pruned from after --against."
        )
    if not torch.equal(cut[0].ids, cut[1].ids):
        raise InputError(
            f"The tokenizers of {model} and {base} make different tokens of {cut[0].text_name}, so that their losses "
            "can't be compared; name the tokenizer that both were trained with by --tokenizer."
        )
    return cut[0]


def _windows_text(windows: ghostssm.Windows) -> str:
    return f"{windows.text_name}, {len(windows)} windows of {windows.length} tokens"
