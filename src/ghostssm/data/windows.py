"""Windows of token ids, cut from a text."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ghostssm.data.sources import Text
from ghostssm.errors import InputError, TextError

_TOKENS_PER_BATCH = 2048


@dataclass(frozen=True)
class Windows:
    """Equal, non-overlapping windows of one text.

    Attributes:
        ids: (count, length), int64.
        text_name, text_fingerprint: the `ghostssm.data.sources.Text` they were cut from.
        bytes_per_token: of that whole text in UTF-8; turns nats per token into bits per byte.
        seed: of the draw, or None when the windows are the text's first.
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

    def part(self, rows: slice | Tensor) -> Windows:
        """Some of the windows."""
        return replace(self, ids=self.ids[rows])

    def batches(self) -> list[slice]:
        """Consecutive windows, about 2048 tokens at a time: enough to keep a processor busy, little memory."""
        per_batch = max(1, _TOKENS_PER_BATCH // self.length)
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
    chosen = torch.arange(available)
    if seed is not None:
        chosen = torch.randperm(available, generator=torch.Generator().manual_seed(seed))
    rows = ids[: available * length].view(available, length)[chosen[:count]]
    return Windows(rows.contiguous(), text.name, text.fingerprint, len(joined.encode()) / len(ids), seed)


def _token_ids(joined: str, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """One stream of ids without special tokens."""
    encoded = tokenizer(joined, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return torch.tensor(encoded["input_ids"], dtype=torch.long)
