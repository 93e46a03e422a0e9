"""How much of one text stands in another, by pieces of 32 tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_PIECE = 32
_FACTOR = 0x5851F42D4C957F2D
"""Knuth's, of a linear congruential generator; products wrap around at 64 bits."""


class Overlap:
    """Finds pieces of the watched windows in other windows, at any position."""

    def __init__(self, watched: Sequence[Tensor]):
        """
        Args:
            watched: ids, (count, length) each; cut into pieces that don't overlap.
        """
        hashes = [_hashes(ids, step=_PIECE) for ids in watched]
        self._hashes = torch.cat(hashes).unique() if hashes else torch.empty(0, dtype=torch.long)
        self.seen_pieces: list[int] = []
        """Numbers of the pieces that were seen."""

    def see(self, ids: Tensor) -> None:
        """Note which pieces stand in windows (count, length)."""
        if len(self._hashes):
            seen = torch.isin(self._hashes, _hashes(ids, step=1))
            self.seen_pieces = sorted({*self.seen_pieces, *seen.nonzero()[:, 0].tolist()})

    @property
    def share(self) -> float | None:
        """Of all pieces, those that were seen; None if none were watched for."""
        return len(self.seen_pieces) / len(self._hashes) if len(self._hashes) else None


def _hashes(ids: Tensor, step: int) -> Tensor:
    """Of every piece that begins at a multiple of ``step`` in a window; none where windows are shorter than a piece."""
    if ids.shape[-1] < _PIECE:
        return torch.empty(0, dtype=torch.long)
    powers = torch.cumprod(torch.full((_PIECE,), _FACTOR), 0)
    return ((ids.unfold(-1, _PIECE, step) + 1) * powers).sum(-1).flatten()
