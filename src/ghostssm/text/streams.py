"""Text that is longer than memory, or endless: read part by part, tokenised, and cut into windows on the way.

TEXT is what `ghostssm.text.sources` reads, of a folder one file at a time; or a dataset on the hub, ORG/NAME, of which
the column "text" of the split "train" is streamed (package ``datasets``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ghostssm.errors import TextError
from ghostssm.text.sources import check_streamable, is_dataset, iterate_text, text_title
from ghostssm.text.windows import encoded

WINDOWS_AT_ONCE = 4096
"""Of one stretch."""
_BETWEEN = "\n\n"
"""Stands after every part of a text, as between the parts of a `Text`."""


@dataclass(frozen=True)
class Place:
    """Where in a stream something begins: an epoch, a part of the text in it, and a token of that part."""

    epoch: int = 0
    part: int = 0
    token: int = 0


@dataclass(frozen=True)
class StreamedText:
    """Windows of a text that is read as they are needed, again and again.

    Attributes:
        spec: TEXT as the user has it; the calibration side of a named corpus. length: tokens per window.
    """

    spec: str
    tokenizer: PreTrainedTokenizerBase
    length: int
    windows_at_once: int = WINDOWS_AT_ONCE

    @property
    def name(self) -> str:
        """For people to read."""
        return text_title(self.spec, "calibration")

    @property
    def text_sha256(self) -> None:
        """None: the text is never read as a whole."""
        return

    def stretches(self, start: Place) -> Iterator[tuple[Tensor, Place]]:
        """Windows (count, length) from a place on, without end, each time with the place after them.

        A last piece of an epoch that is shorter than a window is dropped.

        Raises:
            TextError: as `ghostssm.read_text`; or an epoch has no window.
        """
        while True:
            has_windows = False
            for windows, place in self._epoch(start):
                has_windows = has_windows or len(windows) > 0
                if len(windows):
                    yield windows, place
            if not has_windows and start.part == start.token == 0:
                raise TextError(
                    f"The text {self.name!r} has fewer tokens than one window of {self.length}. "
                    "Give a longer text or a shorter window."
                )
            start = Place(start.epoch + 1)

    def _epoch(self, start: Place) -> Iterator[tuple[Tensor, Place]]:
        size = self.windows_at_once * self.length
        waiting: list[Tensor] = []
        skipped = start.token
        for number, text in enumerate(self._parts(start.part), start.part):
            ids = encoded(text + _BETWEEN, self.tokenizer)
            waiting.append(ids[skipped:])
            skipped = 0
            while sum(map(len, waiting)) >= size:
                joined = torch.cat(waiting)
                waiting = [joined[size:]]  # of this part alone: all before were too few
                yield joined[:size].view(-1, self.length), Place(start.epoch, number, len(ids) - len(waiting[0]))
        rest = torch.cat(waiting) if waiting else torch.empty(0, dtype=torch.long)
        whole = len(rest) // self.length * self.length
        yield rest[:whole].view(-1, self.length), Place(start.epoch + 1)

    def _parts(self, first: int) -> Iterator[str]:
        """The text's parts from one on."""
        if is_dataset(self.spec):
            rows = _dataset(self.spec).skip(first)
            return (_text_of(row, self.spec) for row in rows)
        return islice(iterate_text(self.spec, "calibration"), first, None)


def _dataset(name: str) -> Any:
    check_streamable(name)
    import datasets

    try:
        return datasets.load_dataset(name, split="train", streaming=True)
    except Exception as error:  # the hub client's faults share no base class
        raise TextError(
            f"No text at {name!r}, and no dataset of that name could be fetched from the hub ({type(error).__name__}); "
            "expected a file, a folder, or ORG/NAME of a dataset with a split 'train'."
        ) from error


def _text_of(row: Any, name: str) -> str:
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise TextError(f"A row of the dataset {name!r} has no string under 'text'; found: {', '.join(map(str, row))}.")
    return text
