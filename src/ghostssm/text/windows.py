"""Windows of token ids, cut from a text."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ghostssm.errors import InputError, ModelError, TextError
from ghostssm.progress import stage
from ghostssm.text.sources import Text
from ghostssm.values import Value, short

_TOKENS_PER_BATCH = 2048
_TOKENS_PER_GPU_BATCH = 8192
EVALUATION_SEED = 1
_USUAL_LENGTH = 2048
_CHARACTERS_PER_TOKEN = 8
"""Of the pieces that are tokenised for a window: about twice what the tokens of most texts have."""
_STRETCH = 1 << 24
"""Characters that are tokenised in one go. A tokenizer takes about 200 bytes of memory for each."""


@dataclass(frozen=True, repr=False, eq=False)
class Windows(Value):
    """Equal, non-overlapping windows of one text.

    Attributes:
        ids: (count, length), int64.
        text_name: of the `Text` they were cut from.
        text_fingerprint: SHA-256 of that text.
        bytes_per_token: in UTF-8, of what was tokenised of that text; turns nats per token into bits per byte. NaN
            where the windows were made from ids.
        seed: of the draw, or None when the windows are the text's first, in their order.
    """

    ids: Tensor
    text_name: str
    text_fingerprint: str
    bytes_per_token: float
    seed: int | None

    @classmethod
    def from_ids(cls, ids: Any, length: int | None = None, *, name: str = "token ids") -> Windows:
        """Windows of token ids that are at hand.

        Args:
            ids: a tensor, an array or lists: (count, length), taken as they are; or one row, which is cut.
            length: tokens per window that one row is cut into; 2048, or the whole row if that is shorter, if not given.
                A last, shorter piece is dropped.
            name: what manifests and reports call them.

        Raises:
            InputError: no whole numbers, negative ones, rows of different lengths, or fewer than 2 ids in a row.
        """
        whole = _checked_ids(ids)
        if whole.ndim == 1:
            length = min(_USUAL_LENGTH, len(whole)) if length is None else length
            _check_request(length, None)
            whole = whole[: len(whole) // length * length].view(-1, length)
        if whole.shape[0] < 1 or whole.shape[1] < 2:
            raise InputError(f"The ids make {tuple(whole.shape)} windows; expected one at least, of 2 ids or more.")
        windows = cls(whole.contiguous(), name, "", math.nan, None)
        return replace(windows, text_fingerprint=windows.fingerprint)

    def __repr__(self) -> str:
        drawn = "in their order" if self.seed is None else f"drawn with seed {self.seed}"
        return f"<Windows: {len(self)} of {self.length} tokens of {self.text_name!r}, {drawn}>"

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

    def drawn(self, count: int | None, seed: int) -> Windows:
        """So many of the windows at random; all of them, as they are, if there are no more."""
        if count is None or count >= len(self):
            return self
        return replace(self.part(_drawn(len(self), seed)[:count]), seed=seed)

    def batches(self, device: torch.device | None = None) -> list[slice]:
        """Consecutive windows, about 2048 tokens at a time: enough to keep a processor busy, little memory.

        Four times as many for work on a GPU.
        """
        tokens = _TOKENS_PER_GPU_BATCH if device is not None and device.type == "cuda" else _TOKENS_PER_BATCH
        per_batch = max(1, tokens // self.length)
        return [slice(start, start + per_batch) for start in range(0, len(self), per_batch)]


def _checked_ids(ids: Any) -> Tensor:
    """Ids as (length,) or (count, length), int64."""
    rows = isinstance(ids, list | tuple) and bool(ids) and isinstance(ids[0], Tensor)
    try:
        tensor = torch.stack(tuple(ids)) if rows else torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise InputError(
            f"Found {short(ids)} in place of token ids; expected rows of whole numbers, all of one length: "
            "ghostssm.Windows.from_ids([[5, 17, 3], [4, 4, 9]])."
        ) from None
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool or tensor.ndim not in (1, 2):
        raise InputError(
            f"The ids are {short(tensor)}; expected whole numbers in one row or in equal rows: (count, length)."
        )
    if tensor.numel() and int(tensor.min()) < 0:
        raise InputError(f"The ids hold {int(tensor.min())}; expected numbers of tokens, from 0.")
    return tensor.to("cpu", torch.long)


def cut_windows(
    text: Text,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    count: int | None = None,
    seed: int | None = None,
) -> Windows:
    """Cut the joined text into windows of tokens that don't overlap.

    Only as much is tokenised as is needed. For windows drawn at random the text is divided into cells of 8 characters
    per token of a window, from a random place on. A random token of a random cell begins a window, and each cell has
    one at most; so every place can be drawn, and none twice. A cell that is too poor in tokens is passed over. Where
    the windows would take more than half of the cells, all of the text is tokenised, cut from its beginning and the
    windows are drawn from these; a last, shorter piece is dropped.

    Args:
        text: of `read_text` or `Text.from_strings`.
        tokenizer: of the model.
        length: tokens per window.
        count: at most so many windows; None for all.
        seed: draw the ``count`` windows at random with this seed; None takes the first ones.

    Raises:
        TextError: the text is shorter than one window.
        ModelError: the tokenizer fails.
        InputError: a length below 2, a count below 1, or something else in place of text or tokenizer.
    """
    _check_kinds(text, tokenizer)
    _check_request(length, count)
    with stage(f"tokenising {text.name}"):
        if seed is not None and (drawn := _drawn_apart(text, tokenizer, length, count, seed)) is not None:
            return drawn
        needed = None if seed is not None or count is None else count * length
        ids, size = _token_ids(text.joined, tokenizer, needed)
    available = len(ids) // length
    if available == 0:
        raise TextError(
            f"The text {text.name!r} has {len(ids)} tokens, fewer than one window of {length}. "
            "Give a longer text or a shorter window."
        )
    chosen = torch.arange(available) if seed is None else _drawn(available, seed)
    rows = ids[: available * length].view(available, length)[chosen[:count]]
    return Windows(rows.contiguous(), text.name, text.fingerprint, size / len(ids), seed)


def _check_request(length: int, count: int | None) -> None:
    if length < 2:
        raise InputError(f"The window length is {length}; expected at least 2 tokens.")
    if count is not None and count < 1:
        raise InputError(f"The number of windows is {count}; expected at least 1.")


def _check_kinds(text: object, tokenizer: object) -> None:
    if not isinstance(text, Text):
        raise InputError(
            f"Found {short(text)} in place of a text; expected what ghostssm.read_text('stdlib') or "
            "ghostssm.Text.from_strings(strings) returns. Token ids: ghostssm.Windows.from_ids(ids)."
        )
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise InputError(
            f"Found {short(tokenizer)} in place of a tokenizer; expected one of transformers, such as "
            "checkpoint.require_tokenizer() or AutoTokenizer.from_pretrained(...)."
        )


def _drawn_apart(
    text: Text, tokenizer: PreTrainedTokenizerBase, length: int, count: int | None, seed: int
) -> Windows | None:
    """So many windows, each of a cell of its own; only these cells are tokenised. None if there are too few."""
    joined, cell = text.joined, _CHARACTERS_PER_TOKEN * length
    if count is None or 2 * count * cell > len(joined):
        return None
    random = torch.Generator().manual_seed(seed)

    def below(limit: int) -> int:
        return int(torch.randint(limit, (), generator=random))

    first = below(cell)
    rows: list[Tensor] = []
    tokens = size = 0
    for number in torch.randperm((len(joined) - first) // cell, generator=random).tolist():
        begin = first + number * cell
        piece = joined[begin : begin + cell]
        piece = piece[_first_break(piece) :]
        ids = encoded(piece, tokenizer)
        tokens, size = tokens + len(ids), size + len(piece.encode())
        if len(ids) >= length:
            start = below(len(ids) - length + 1)
            rows.append(ids[start : start + length])
        if len(rows) == count:
            return Windows(torch.stack(rows), text.name, text.fingerprint, size / tokens, seed)
    return None


def _first_break(piece: str) -> int:
    """Where the first whole word of a piece begins, with the space before it; 0 where there are no spaces."""
    return min((place for space in " \n" if (place := piece.find(space)) >= 0), default=0)


def _drawn(available: int, seed: int) -> Tensor:
    """All numbers below ``available``, in random order."""
    return torch.randperm(available, generator=torch.Generator().manual_seed(seed))


def evaluation_windows(
    text: Text, tokenizer: PreTrainedTokenizerBase, length: int, count: int | None = None
) -> Windows:
    """The windows to measure a loss on.

    All of a text in its order, or ``count`` of them, drawn at random but the same in every run: the first ones would
    tell of the text's beginning only. Raises what `cut_windows` raises.

    Args:
        text: of `read_text` or `Text.from_strings`.
        tokenizer: of the model.
        length: tokens per window.
        count: how many to draw; None for all.
    """
    _check_kinds(text, tokenizer)
    _check_request(length, count)
    if (drawn := _drawn_apart(text, tokenizer, length, count, EVALUATION_SEED)) is not None:
        return drawn
    return cut_windows(text, tokenizer, length).drawn(count, EVALUATION_SEED)


def _token_ids(joined: str, tokenizer: PreTrainedTokenizerBase, needed: int | None) -> tuple[Tensor, int]:
    """One stream of ids without special tokens, and the bytes in UTF-8 that they stand for.

    A text is cut before a word, every 16 million characters, and tokenised in stretches. Where only the first
    ``needed`` ids are wanted, stretches are as long as these should be, and the rest is left.
    """
    ids: list[Tensor] = []
    size = 0
    most = _STRETCH if needed is None else min(_STRETCH, _CHARACTERS_PER_TOKEN * needed)
    for stretch in _stretches(joined, most):
        ids.append(encoded(stretch, tokenizer))
        size += len(stretch.encode())
        if needed is not None and sum(map(len, ids)) >= needed:
            break
    return torch.cat(ids), size


def _stretches(joined: str, most: int) -> Iterator[str]:
    start = 0
    while len(joined) - start > most:
        last = start + most
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
