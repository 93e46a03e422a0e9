"""What a written model makes of a few tokens: the probe, and where the precision that it is stored in is too narrow.

The model's own forward pass runs, on what is in the files, with one block in memory at a time.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from ghostssm.checkpoint.loading import Checkpoint
from ghostssm.checkpoint.manifest import Overflow, Probe, probe_tokens
from ghostssm.checkpoint.source import Source, find_source
from ghostssm.checkpoint.streamed import StreamedBlocks, open_blocks
from ghostssm.errors import CONVERT, NumericalError, PrecisionWarning

_HALVES = (torch.float16, torch.bfloat16)


def probed(folder: Path) -> tuple[Probe, Overflow | None]:
    """The probe of the model in a folder, in float32 or wider, and its overflow in the stored dtype, if there is one.

    Warns with PrecisionWarning of an overflow.

    Raises:
        NumericalError: the probe is not finite; names the block.
    """
    source = find_source(str(folder))
    stored = open_blocks(source)
    dtype = torch.promote_types(stored.model.dtype, torch.float32)
    blocks = stored if stored.model.dtype == dtype else open_blocks(source, dtype)
    ids = probe_tokens(blocks.model.config.vocab_size)
    logits, broken = _logits(blocks, ids)
    probe = Probe.of_logits(ids, logits, dtype)
    if broken is not None or probe is None:
        raise NumericalError(
            f"NaN or Inf in the output of {broken or 'the head'}, in {_name(dtype)}. The checkpoint is broken or "
            "overflows; evaluate the unpruned model first."
        )
    return probe, overflow_in(stored, ids)


def overflow_in(blocks: StreamedBlocks, ids: Sequence[int] | None = None) -> Overflow | None:
    """Where a model's numbers leave the range of half-precision weights, on some tokens or on those of a probe.

    Warns with PrecisionWarning of it.
    """
    dtype = blocks.model.dtype
    if dtype not in _HALVES:
        return None
    logits, part = _logits(blocks, ids or probe_tokens(blocks.model.config.vocab_size))
    if part is None and torch.isfinite(logits).all():
        return None
    found = Overflow(_name(dtype), part or "the head")
    warnings.warn(found.text, PrecisionWarning, stacklevel=2)
    return found


def probe_in(source: Source, token_ids: Sequence[int], dtype: torch.dtype) -> Probe | None:
    """The probe of a source's model on some tokens, in a dtype; None if it is not finite."""
    return Probe.of_logits(token_ids, _logits(open_blocks(source, dtype), token_ids)[0], dtype)


class FiniteLogits(LogitsProcessor):  # type: ignore[misc]
    """For transformers' ``generate``: raises NumericalError in place of tokens that come of NaN."""

    def __init__(self, checkpoint: Checkpoint):
        self._name, self._dtype = checkpoint.source.name, checkpoint.model.dtype

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # Minus infinity rules a token out.
        if torch.isnan(scores).any() or torch.isposinf(scores).any():
            raise NumericalError(
                f"NaN or Inf in the logits of {self._name} in {_name(self._dtype)}: its activations overflow, or it is "
                f"broken. Convert it, `{CONVERT}` (or f32), and generate with that."
            )
        return scores


def _logits(blocks: StreamedBlocks, token_ids: Sequence[int]) -> tuple[Tensor, str | None]:
    """Logits (l, vocab), and the name of the first block whose output is not finite, if one's is not."""
    broken: list[str] = []

    def opening(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            with blocks.opened(index) as block:
                del block.__dict__["forward"]  # this very function, which its copy has as well
                output = block(*args, **kwargs)
            hidden = output[0] if isinstance(output, tuple) else output
            if not torch.isfinite(hidden).all():
                broken.append(blocks.names[index])
            return output

        return forward

    for index, module in enumerate(blocks.modules):
        module.__dict__["forward"] = opening(index)
    try:
        with torch.no_grad():
            ids = torch.tensor([list(token_ids)], device=blocks.device)
            logits: Tensor = blocks.model(input_ids=ids, use_cache=False).logits[0]
    finally:
        for module in blocks.modules:
            module.__dict__.pop("forward")
    return logits, broken[0] if broken else None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
