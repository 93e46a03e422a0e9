"""A probe is what a model makes of a few tokens; it also shows where the dtype of the weights is too narrow.

The model's own forward pass runs on what is in the files, with one block in memory at a time.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ghostssm.checkpoint.source import Source, find_source
from ghostssm.checkpoint.streamed import StreamedBlocks, open_blocks
from ghostssm.errors import CONVERT, NumericalError, PrecisionWarning
from ghostssm.units import dtype_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PROBE_TOKENS = 16
_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3}
_HALF_TOLERANCE = 0.1
_HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Probe:
    """What a model makes of a few tokens: enough to see that it is the same model.

    It is computed in float32, or in float64 for float64 weights. In half precision the numbers would differ more
    between processors, and might not be finite.

    Attributes:
        token_ids: the input, one sequence.
        mean, deviation, largest: of the logits at every position.
        tolerance: how far they may be off on other processors and versions, which round differently. Mean and largest:
            in standard deviations of a position's logits; the deviation: as a share of itself.
        dtype: that the logits were computed in.
    """

    token_ids: Sequence[int]
    mean: Sequence[float]
    deviation: Sequence[float]
    largest: Sequence[float]
    tolerance: float
    dtype: str

    @classmethod
    def of(cls, model: PreTrainedModel, token_ids: Sequence[int] | None = None) -> Probe | None:
        """Run a model on some tokens, or on tokens of our choice; None if its logits are not finite."""
        ids = probe_tokens(model.config.vocab_size) if token_ids is None else token_ids
        tokens = torch.tensor([list(ids)], device=model.device)
        with torch.inference_mode():
            logits = model(input_ids=tokens, return_dict=True, use_cache=False).logits[0]
        return cls.of_logits(ids, logits, model.dtype)

    @classmethod
    def of_logits(cls, token_ids: Sequence[int], logits: Tensor, dtype: torch.dtype) -> Probe | None:
        """From the logits (l, vocab) of a model in a dtype; None if they are not finite."""
        logits = logits.double()
        if not torch.isfinite(logits).all():
            return None
        return cls(
            tuple(token_ids),
            tuple(logits.mean(-1).tolist()),
            tuple(logits.std(-1).tolist()),
            tuple(logits.amax(-1).tolist()),
            _TOLERANCES.get(dtype, _HALF_TOLERANCE),
            dtype_name(dtype),
        )

    @classmethod
    def from_json(cls, value: Any) -> Probe | None:
        """What a manifest has; None for what is no probe."""
        try:
            tokens = tuple(value["token_ids"])
            mean, deviation, largest = (tuple(map(float, value[name])) for name in ("mean", "deviation", "largest"))
            tolerance, dtype = float(value["tolerance"]), str(value["dtype"])
        except (KeyError, TypeError, ValueError, OverflowError):
            return None
        known = dtype in ("float64", "float32", "float16", "bfloat16") and all(type(token) is int for token in tokens)
        same_length = len(tokens) == len(mean) == len(deviation) == len(largest)
        finite = all(map(math.isfinite, (tolerance, *mean, *deviation, *largest)))
        return cls(tokens, mean, deviation, largest, tolerance, dtype) if known and same_length and finite else None

    def difference(self, other: Probe) -> float:
        """The largest difference at any position, in standard deviations of its logits."""
        pairs = ((self.mean, other.mean), (self.deviation, other.deviation), (self.largest, other.largest))
        return max(
            abs(one - another) / max(deviation, 1e-12)
            for ours, others in pairs
            for one, another, deviation in zip(ours, others, self.deviation, strict=True)
        )


@dataclass(frozen=True)
class Overflow:
    """Where a model's numbers leave the range of the dtype that its weights are stored in.

    Attributes:
        dtype: without ``torch.``. part: the first block, or the head, whose output is not finite.
    """

    dtype: str
    part: str

    @classmethod
    def from_json(cls, value: Any) -> Overflow | None:
        """What a manifest has; None for what is no overflow."""
        dtype, part = (value.get("dtype"), value.get("part")) if isinstance(value, dict) else (None, None)
        return cls(dtype, part) if isinstance(dtype, str) and isinstance(part, str) else None

    @property
    def text(self) -> str:
        wider, convert = "bfloat16 or float32", f"{CONVERT} (or f32)"
        if self.dtype == "bfloat16":
            wider, convert = "float32", CONVERT.replace("bf16", "f32")
        return (
            f"In {self.dtype}, in which the weights are stored, the output of {self.part} is not finite; in float32 it "
            f"is. Run the model in {wider}, or convert it: {convert}."
        )


def probe_tokens(vocabulary: int) -> list[int]:
    """The tokens that a new probe is taken with."""
    return [7919 * (place + 1) % vocabulary for place in range(_PROBE_TOKENS)]


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
            f"NaN or Inf in the output of {broken or 'the head'}, in {dtype_name(dtype)}. The checkpoint is broken or "
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
    overflow = Overflow(dtype_name(dtype), part or "the head")
    warnings.warn(overflow.text, PrecisionWarning, stacklevel=2)
    return overflow


def probe_in(source: Source, token_ids: Sequence[int], dtype: torch.dtype) -> Probe | None:
    """The probe of a source's model on some tokens, in a dtype; None if it is not finite."""
    return Probe.of_logits(token_ids, _logits(open_blocks(source, dtype), token_ids)[0], dtype)


def _logits(blocks: StreamedBlocks, token_ids: Sequence[int]) -> tuple[Tensor, str | None]:
    """Logits (l, vocab), and the name of the first block whose output is not finite, or None."""
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
