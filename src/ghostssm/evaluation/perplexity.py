"""Perplexity by the usual protocol: non-overlapping windows, each on its own, mean negative log likelihood."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ghostssm.acceleration import replaced_forward
from ghostssm.data.windows import Windows
from ghostssm.errors import NumericalError
from ghostssm.families import mixers_of
from ghostssm.progress import Progress, silent


@dataclass(frozen=True)
class Difference:
    """A mean difference over paired windows, with its standard error; nats per token."""

    mean: float
    standard_error: float


@dataclass(frozen=True)
class Evaluation:
    """Losses of a model on windows of text.

    Attributes:
        losses: (count,), float64: mean negative log likelihood of each window's tokens but the first, nats per token.
        bytes_per_token: of the text, to turn nats per token into bits per byte.
    """

    losses: Tensor
    bytes_per_token: float

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.losses.mean().item()

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)

    @property
    def bits_per_byte(self) -> float:
        return self.loss / math.log(2) / self.bytes_per_token

    def excess_over(self, dense: Evaluation) -> Difference:
        """This loss minus the dense model's on the same windows; NaN as error when there is one window only."""
        differences = self.losses - dense.losses
        error = differences.std() / math.sqrt(len(differences)) if len(differences) > 1 else torch.tensor(math.nan)
        return Difference(differences.mean().item(), error.item())


def evaluate(model: PreTrainedModel, windows: Windows, progress: Progress = silent) -> Evaluation:
    """The model's loss on every window.

    Raises:
        NumericalError: a loss that is not finite.
    """
    return Evaluation(token_losses(model, windows, progress).double().mean(1), windows.bytes_per_token)


def token_losses(model: PreTrainedModel, windows: Windows, progress: Progress = silent) -> Tensor:
    """The loss of every token but each window's first: (count, length - 1), float32, on the CPU, nats.

    Raises:
        NumericalError: a loss that is not finite.
    """
    losses = []
    with torch.inference_mode(), replaced_forward(mixers_of(model)):
        for span in windows.batches():
            progress("windows", span.start, len(windows))
            ids = windows.ids[span].to(model.device)
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            by_token = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            losses.append(by_token.view(len(ids), -1).cpu())
    progress("windows", len(windows), len(windows))
    found = torch.cat(losses)
    if not torch.isfinite(found).all():
        raise NumericalError(
            f"The loss on {windows.text_name!r} is not finite; the model's activations overflow. "
            "Evaluate the unpruned model on the same text; if it does not overflow, keep more of the state."
        )
    return found
