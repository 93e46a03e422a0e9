"""Batches of windows, drawn from a text without repetition, and the windows that are set apart to judge by.

The text comes in stretches of some thousand windows, each dealt out in a random order that its number decides. So a
place in the text is a few numbers, and a run that goes on from there gets the same batches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ghostssm.errors import TextError
from ghostssm.text.overlap import Overlap
from ghostssm.text.streams import Place
from ghostssm.text.windows import Windows

HELD_OUT_ONE_IN = 8
MOST_HELD_OUT = 32
"""Windows of the text that are held out: one in eight of its first stretch, and no more than this."""
_HELD_OUT_SEED, _MOST_SEED = 0x5EED, 1 << 62


class Source(Protocol):
    """Where windows come from."""

    @property
    def name(self) -> str:
        """For people to read."""
        ...

    @property
    def text_sha256(self) -> str | None:
        """Of the text, if it is held as a whole."""
        ...

    def stretches(self, start: Place) -> Iterator[tuple[Tensor, Place]]:
        """Stretches of windows (count, length) from a place on, without end; each comes with the place after it.

        An epoch begins with a stretch of its own.
        """
        ...


@dataclass(frozen=True)
class HeldWindows:
    """A source of windows in memory, all of them in one stretch."""

    windows: Windows

    @property
    def name(self) -> str:
        return self.windows.text_name

    @property
    def text_sha256(self) -> str:
        return self.windows.text_fingerprint

    def stretches(self, start: Place) -> Iterator[tuple[Tensor, Place]]:
        epoch = start.epoch
        while True:
            epoch += 1
            yield self.windows.ids, Place(epoch)


class Batches:
    """Windows to train on, batch by batch, and those to judge by.

    Attributes:
        held_out: (count, length); they are in no batch, in no epoch.
        tokens_sha256: of all batches so far in their order.
    """

    def __init__(self, source: Source, batch: int, seed: int, watched: Sequence[Tensor] = ()):
        """
        Args:
            watched: windows of other texts, (count, length) each; ``overlap`` tells how much of them was in batches.

        Raises:
            TextError: the text's first stretch has no batch besides a window to hold out.
        """
        self.source, self.batch, self._seed = source, batch, seed
        self.overlap = Overlap(watched)
        self.tokens_sha256 = ""
        self._place, self._dealt = Place(), 0
        self._stretches = source.stretches(self._place)
        self._next: Place
        self._windows, self._next = next(self._stretches)
        count = len(self._windows)
        apart = held_out_of(count)
        if count - apart < batch:
            raise TextError(
                f"The text {source.name!r} has {count} windows of {self._windows.shape[1]} tokens, of which {apart} "
                f"must be held out, fewer than one batch of {batch}; give a longer text, a shorter window or a smaller "
                "batch."
            )
        self._apart = _shuffled(count, _HELD_OUT_SEED)[:apart]
        self.held_out = self._windows[self._apart]
        self._order = self._shuffled()

    def take(self) -> Tensor:
        """The next batch, (batch, length)."""
        rows = [self._deal(self.batch)]
        while (missing := self.batch - sum(map(len, rows))) > 0:
            self._place, self._dealt = self._next, 0
            self._windows, self._next = next(self._stretches)
            self._order = self._shuffled()
            rows.append(self._deal(missing))
        ids = torch.cat(rows)
        digest = hashlib.sha256(self.tokens_sha256.encode() + ids.numpy().astype("<i8").tobytes())
        self.tokens_sha256 = digest.hexdigest()
        self.overlap.see(ids)
        return ids

    def state(self) -> dict[str, Any]:
        """Where in the text the next batch begins, as JSON values."""
        so_far = {"tokens_sha256": self.tokens_sha256, "overlap": self.overlap.seen_pieces}
        return {"place": asdict(self._place), "dealt": self._dealt, **so_far}

    def restore(self, state: dict[str, Any]) -> None:
        """Go to where a `state` was taken."""
        self._place, self._dealt = Place(**state["place"]), state["dealt"]
        self.tokens_sha256, self.overlap.seen_pieces = state["tokens_sha256"], state["overlap"]
        self._stretches = self.source.stretches(self._place)
        self._windows, self._next = next(self._stretches)
        self._order = self._shuffled()

    def _deal(self, count: int) -> Tensor:
        rows = self._order[self._dealt : self._dealt + count]
        self._dealt += len(rows)
        return self._windows[rows]

    def _shuffled(self) -> Tensor:
        """The order in which this stretch is dealt out, without what is held out."""
        place = self._place
        order = _shuffled(len(self._windows), hash((self._seed, place.epoch, place.part, place.token)) % _MOST_SEED)
        begins_epoch = (place.part, place.token) == (0, 0)
        return order[~torch.isin(order, self._apart)] if begins_epoch else order


def held_out_of(count: int) -> int:
    """How many of the windows of a text's first stretch are held out."""
    return max(1, min(count // HELD_OUT_ONE_IN, MOST_HELD_OUT))


def _shuffled(count: int, seed: int) -> Tensor:
    """All numbers below ``count``, in random order."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))
