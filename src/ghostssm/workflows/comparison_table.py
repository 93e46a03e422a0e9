"""A comparison as text, cell by cell, for a terminal, a page or a notebook."""

from __future__ import annotations

from collections.abc import Sequence

from ghostssm.units import bytes_text, plus_minus
from ghostssm.workflows.compare import Row


def comparison_cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Headers and lines, the largest state and the smallest loss first.

    A stored state that is larger than the one asked for stands in brackets behind it.
    """
    batches = list(rows[0].tokens_per_second)
    headers = ["method", "N'", "perplexity", "bits/byte", "excess loss", "state/seq"]
    headers += [f"tok/s, batch {batch}" for batch in batches]
    ranked = sorted(rows, key=lambda row: (-row.state_size, row.excess))
    return headers, [[*_cells(row), *(f"{row.tokens_per_second[batch]:,.0f}" for batch in batches)] for row in ranked]


def _cells(row: Row) -> list[str]:
    padded = "" if row.stored_state_size == row.state_size else f" ({row.stored_state_size:g})"
    return [
        row.method,
        f"{row.state_size}{padded}",
        f"{row.perplexity:.3f}",
        f"{row.bits_per_byte:.4f}",
        "" if row.is_dense else plus_minus(row.excess, row.standard_error),
        bytes_text(row.state_bytes),
    ]
