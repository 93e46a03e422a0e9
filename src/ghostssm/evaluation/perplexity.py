"""Losses by the usual protocol: non-overlapping windows, each on its own, mean negative log likelihood."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ghostssm.calibration.blocks import Blocks, blocks_of
from ghostssm.calibration.capture import captured_output, logits_after, outputs_besides_hidden
from ghostssm.calibration.scratch import Scratch
from ghostssm.calibration.walk import LayerWalk
from ghostssm.errors import NumericalError
from ghostssm.models.families import mixers_of
from ghostssm.models.forward import replaced_forward, rounded_forward
from ghostssm.ops.state_format import FLOAT32_STORAGE, StateStorage
from ghostssm.plan.measurement import Difference, Measurement
from ghostssm.progress import Progress, silent
from ghostssm.text.windows import Windows
from ghostssm.units import plus_minus, text_name
from ghostssm.values import Value

_TOKENS_OF_LOGITS = 512


def perplexity_of(loss: float) -> float:
    """The exponential of a loss in nats per token; infinite where a double can't hold it."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


@dataclass(frozen=True, repr=False, eq=False)
class Evaluation(Value):
    """Losses of a model on windows of text.

    Attributes:
        losses: (count,), float64: mean negative log likelihood of each window's tokens but the first, nats per token.
        bytes_per_token: of the text, to turn nats per token into bits per byte.
        consecutive: the windows follow one another in the text, so that their losses are alike (`_standard_error`).
    """

    losses: Tensor
    bytes_per_token: float
    consecutive: bool = False

    def __repr__(self) -> str:
        loss = plus_minus(self.loss, self.standard_error)
        return f"<Evaluation: perplexity {self.perplexity:.3f}, loss {loss} nats per token, {len(self.losses)} windows>"

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.losses.mean().item()

    @property
    def standard_error(self) -> float:
        """The loss's standard error over windows; NaN when there is one window only."""
        return _standard_error(self.losses, self.consecutive)

    @property
    def perplexity(self) -> float:
        return perplexity_of(self.loss)

    @property
    def bits_per_byte(self) -> float:
        return self.loss / math.log(2) / self.bytes_per_token

    def excess_over(self, dense: Evaluation) -> Difference:
        """This loss minus the dense model's on the same windows; NaN as error when there is one window only."""
        differences = self.losses - dense.losses
        return Difference(differences.mean().item(), _standard_error(differences, self.consecutive))


def _standard_error(values: Tensor, consecutive: bool) -> float:
    """The standard error of the mean of values (count,); NaN for one value.

    Neighbours in a text are alike, so that what follows one another is first averaged over about sqrt(count) blocks
    (batch means: Glynn & Whitt 1991); values drawn at random are independent.
    """
    if consecutive and len(values) > 3:
        values = torch.stack([block.mean() for block in values.tensor_split(math.isqrt(len(values)))])
    return values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan


def evaluate(
    model: PreTrainedModel | Blocks,
    windows: Windows,
    progress: Progress = silent,
    scratch: Scratch | None = None,
    storage: StateStorage = FLOAT32_STORAGE,
) -> Evaluation:
    """The model's loss on every window.

    Args:
        model: in memory, through which batch goes by batch; or its blocks, of which each takes all windows in turn, so
            that memory holds one of them and the hidden states of all windows.
        scratch: the room for these hidden states; memory if not given.
        storage: how the recurrent state is kept: it is rounded after every token, as in decoding.

    Raises:
        NumericalError: a loss that is not finite.
    """
    by_token = token_losses(model, windows, progress, scratch, storage)
    return Evaluation(by_token.double().mean(1), windows.bytes_per_token, windows.seed is None)


def evaluate_in_float32(
    model: PreTrainedModel, windows: Windows, progress: Progress = silent, state_dtype: str = "float32"
) -> Evaluation:
    """The model's loss in float32; a model in half precision is copied for it, and stays as it is.

    Args:
        state_dtype: of the recurrent state alone, rounded after every token.

    Raises:
        NumericalError: a loss that is not finite.
    """
    whole = model if model.dtype.itemsize >= 4 else copy.deepcopy(model).float()
    return evaluate(whole, windows, progress, storage=StateStorage.of(state_dtype))


def measurement_of(windows: Windows, dense: Evaluation, pruned: Evaluation) -> Measurement:
    """The losses of a dense and a pruned model on the same windows, as one value."""
    excess = pruned.excess_over(dense)
    text = text_name(windows.text_name)
    return Measurement(text, len(windows), windows.length, dense.loss, pruned.loss, excess)


def token_losses(
    model: PreTrainedModel | Blocks,
    windows: Windows,
    progress: Progress = silent,
    scratch: Scratch | None = None,
    storage: StateStorage = FLOAT32_STORAGE,
) -> Tensor:
    """The loss of every token but each window's first: (count, length - 1), float32, on the CPU, nats.

    Args: as `evaluate`.

    Raises:
        NumericalError: a loss that is not finite.
    """
    batches = []
    blocks = blocks_of(model)
    rests = outputs_besides_hidden(blocks, windows)
    hidden_states = _by_batch(blocks, windows, progress, storage) if isinstance(model, PreTrainedModel) else None
    if hidden_states is None:
        hidden_states = _by_block(blocks, windows, progress, scratch, storage)
    for span, hidden in hidden_states:
        ids = windows.ids[span].to(blocks.device)
        by_token = torch.cat(
            [
                _token_losses(blocks, rests, hidden[:, part], ids[:, part], ids[:, part.start + 1 : part.stop + 1])
                for part in _stretches(ids)
            ],
            dim=1,
        )
        batches.append(by_token.cpu())
    progress("windows", len(windows), len(windows))
    losses = torch.cat(batches)
    if not torch.isfinite(losses).all():
        raise NumericalError(
            f"The loss on {windows.text_name!r} is not finite; the model's activations overflow. "
            "Evaluate the unpruned model on the same text; if it does not overflow, keep more of the state."
        )
    return losses


def logits_of(blocks: Blocks, windows: Windows) -> Iterator[tuple[slice, Tensor]]:
    """Each batch's windows, and the logits (b, l, vocab) of all their positions; memory holds one block at a time."""
    rests = outputs_besides_hidden(blocks, windows)
    for span, hidden in _by_block(blocks, windows, silent, None, FLOAT32_STORAGE):
        yield span, logits_after(blocks, rests, hidden, windows.ids[span].to(blocks.device))


def _by_batch(
    blocks: Blocks, windows: Windows, progress: Progress, storage: StateStorage
) -> Iterator[tuple[slice, Tensor]]:
    """For each batch its windows, and the hidden states after the last block."""
    mixers = mixers_of(blocks.model)
    for span in windows.batches():
        progress("windows", span.start, len(windows))
        ids = windows.ids[span].to(blocks.device)
        with replaced_forward(mixers, rounded_forward(storage, span.start)):
            yield span, captured_output(blocks.modules[-1], partial(blocks.model, input_ids=ids, use_cache=False))


def _by_block(
    blocks: Blocks, windows: Windows, progress: Progress, scratch: Scratch | None, storage: StateStorage
) -> Iterator[tuple[slice, Tensor]]:
    """The same as `_by_batch`, from a walk over the blocks."""
    walk = LayerWalk(blocks, windows, scratch)
    for block in walk.blocks():
        progress("layers", block.index, len(walk))
        block.advance(storage)
    progress("layers", len(walk), len(walk))
    for span in windows.batches():
        progress("windows", span.start, len(windows))
        yield span, walk.hidden[span].to(blocks.device)


def _stretches(ids: Tensor) -> Iterator[slice]:
    """Positions of a batch whose logits are computed together; the last position predicts nothing and is left out."""
    step = max(1, _TOKENS_OF_LOGITS // len(ids))
    end = ids.shape[1] - 1
    return (slice(start, min(start + step, end)) for start in range(0, end, step))


def _token_losses(
    blocks: Blocks, rests: Sequence[tuple[Any, ...] | None], hidden: Tensor, ids: Tensor, targets: Tensor
) -> Tensor:
    """Negative log likelihood of the targets (b, l), from the hidden states (b, l, hidden_size) before them."""
    logits = logits_after(blocks, rests, hidden, ids).float()
    by_token = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return by_token.view(targets.shape)
