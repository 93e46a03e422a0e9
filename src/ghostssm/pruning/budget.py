"""Divide a total state over the layers of a model by what a smaller state costs each of them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def allocate(curves: Sequence[Tensor], total: int, multiple: int) -> tuple[int, ...]:
    """State sizes, in multiples, that add up to at most a total and cost the least together.

    Every layer starts with one multiple; the next goes where it removes the most error, until the total is reached.
    That is optimal for convex curves, which measured errors nearly are.

    Args:
        curves: one per layer, (n + 1,): its error when r = 0, 1, ..., n channels are left, in a unit that is the same
            for all layers. total: channels, summed over the layers.

    Returns:
        a size per layer, at least ``multiple`` and at most n.
    """
    sizes = [min(multiple, len(curve) - 1) for curve in curves]

    def gain(layer: int) -> float:
        curve, size = curves[layer], sizes[layer]
        larger = min(size + multiple, len(curve) - 1)
        return ((curve[size] - curve[larger]) / (larger - size)).item()

    while True:
        room = total - sum(sizes)
        able = [
            layer
            for layer, curve in enumerate(curves)
            if sizes[layer] < len(curve) - 1 and min(multiple, len(curve) - 1 - sizes[layer]) <= room
        ]
        if not able:
            return tuple(sizes)
        best = max(able, key=gain)
        sizes[best] = min(sizes[best] + multiple, len(curves[best]) - 1)
