"""Windows of token ids, cut from a text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ghostssm.errors import InputError, ModelError, TextError
from ghostssm.text.sources import Text

_TOKENS_PER_BATCH = 2048
_TOKENS_PER_GPU_BATCH = 8192
_EVALUATION_SEED = 1
_STRETCH = 1 << 24
"""Characters that are tokenised in one go. A tokenizer takes about 200 bytes of memory for each."""


@dataclass(frozen=True)
class Windows:
    """Equal, non-overlapping windows of one text.

    Attributes:
        ids: (count, length), int64.
        text_name, text_fingerprint: the `ghostssm.text.sources.Text` they were cut from.
        bytes_per_token: of that whole text in UTF-8; turns nats per token into bits per byte.
        seed: of the draw, or None when the windows are the text's first, in their order.
    """

    ids: Tensor
    text_name: str
    text_fingerprint: str
    bytes_per_token: float
    seed: int | None

    def __len__(self) -> int:
        return self.ids.shape[0]

    @property
    def length(self) -> int:
        return self.ids.shape[1]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the ids, hexadecimal: the same for the same text, tokenizer, length, count and seed."""
        return hashlib.sha256(self.ids.cpu().numpy().astype("<i8").tobytes()).hexdigest()

    def part(self, rows: slice | Tensor) -> Windows:
        """Some of the windows."""
        return replace(self, ids=self.ids[rows])

    def batches(self, device: torch.device | None = None) -> list[slice]:
        """Consecutive windows, about 2048 tokens at a time: enough to keep a processor busy, little memory.

        Four times as many for work on a GPU.
        """
        tokens = _TOKENS_PER_GPU_BATCH if device is not None and device.type == "cuda" else _TOKENS_PER_BATCH
        per_batch = max(1, tokens // self.length)
        return [slice(start, start + per_batch) for start in range(0, len(self), per_batch)]


def cut_windows(
    text: Text,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    count: int | None = None,
    seed: int | None = None,
) -> Windows:
    """Tokenise the joined text and cut it into windows that don't overlap; a last, shorter piece is dropped.

    Args:
        length: tokens per window.
        count: at most so many windows; None for all.
        seed: draw the ``count`` windows at random with this seed; None takes the first ones.

    Raises:
        TextError: the text is shorter than one window.
        ModelError: the tokenizer fails.
        InputError: a length below 2 or a count below 1.
    """
    if length < 2:
        raise InputError(f"The window length is {length}; expected at least 2 tokens.")
    if count is not None and count < 1:
        raise InputError(f"The number of windows is {count}; expected at least 1.")
    joined = text.joined
    ids = _token_ids(joined, tokenizer)
    available = len(ids) // length
    if available == 0:
        raise TextError(
            f"The text {text.name!r} has {len(ids)} tokens, fewer than one window of {length}. "
            "Give a longer text or a shorter window."
        )
    chosen = torch.arange(available) if seed is None else _drawn(available, seed)
    rows = ids[: available * length].view(available, length)[chosen[:count]]
    return Windows(rows.contiguous(), text.name, text.fingerprint, len(joined.encode()) / len(ids), seed)


def _drawn(available: int, seed: int) -> Tensor:
    """All numbers below ``available``, in random order."""
    return torch.randperm(available, generator=torch.Generator().manual_seed(seed))


def evaluation_windows(
    text: Text, tokenizer: PreTrainedTokenizerBase, length: int, count: int | None = None
) -> Windows:
    """The windows to measure a loss on: all of a text in its order, or ``count`` of them, drawn at random but the same
    in every run. The first ones would tell of the text's beginning only.

    Args, raises: as `cut_windows`.
    """
    whole = cut_windows(text, tokenizer, length)
    if count is None or count >= len(whole):
        return whole
    chosen = _drawn(len(whole), _EVALUATION_SEED)[:count]
    return replace(whole.part(chosen), seed=_EVALUATION_SEED)


def _token_ids(joined: str, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """One stream of ids without special tokens.

    A text of more than 16 million characters is cut before a word, every so many, and tokenised in stretches.
    """
    return torch.cat([encoded(stretch, tokenizer) for stretch in _stretches(joined)])


def _stretches(joined: str) -> Iterator[str]:
    start = 0
    while len(joined) - start > _STRETCH:
        last = start + _STRETCH
        end = max(joined.rfind(space, start + 1, last) for space in " \n")
        end = last if end < 0 else end
        yield joined[start:end]
        start = end
    yield joined[start:]


def encoded(text: str, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The ids of a text without special tokens, (tokens,); raises ModelError if the tokenizer fails."""
    try:
        encoded = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return torch.tensor(encoded["input_ids"], dtype=torch.long)
    except Exception as error:  # tokenizers raises many classes
        raise ModelError(f"The tokenizer can't encode the text ({type(error).__name__}: {error}).") from error
