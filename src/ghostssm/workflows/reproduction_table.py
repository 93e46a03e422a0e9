"""The paper's tables with the published and the measured perplexities above one another."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ghostssm.workflows.published import DENSE, Wanted, source
from ghostssm.workflows.reproduction import Key, Measured, Settings


@dataclass(frozen=True)
class PrintedTable:
    """A title, and rows of as many cells as there are headers; the first two columns are text."""

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    @property
    def markdown(self) -> str:
        lines = [self.headers, ("---", "---", *("---:",) * (len(self.headers) - 2)), *self.rows]
        return f"**{self.title}**\n\n" + "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def printed_tables(wanted: Sequence[Wanted], measured: Mapping[Key, Measured]) -> list[PrintedTable]:
    """Each table that cells were taken from; one per state size where models are the columns."""
    tables = []
    sparsity = [cell for cell in wanted if cell.table == "sparsity"]
    if sparsity:
        dense, pruned = _apart(sparsity)
        tables.append(_by_size(dense[0], pruned, measured))
    dense, pruned = _apart([cell for cell in wanted if cell.table == "size"])
    labels = dict.fromkeys(_size_label(cell) for cell in pruned)
    tables += [
        _by_model(label, dense, [cell for cell in pruned if _size_label(cell) == label], measured) for label in labels
    ]
    return tables


def _apart(cells: Sequence[Wanted]) -> tuple[list[Wanted], list[Wanted]]:
    return [cell for cell in cells if cell.method == DENSE], [cell for cell in cells if cell.method != DENSE]


def _by_size(dense: Wanted, pruned: Sequence[Wanted], measured: Mapping[Key, Measured]) -> PrintedTable:
    """One model: methods down, sizes across."""
    columns = tuple(dict.fromkeys(_size_label(cell) for cell in pruned))
    found = _measured_text(dense, measured)
    title = f"{dense.model}, dense: {_published_text(dense)} published" + (f", {found} measured" if found else "")
    return PrintedTable(title, ("method", "", *columns), _rows(pruned, measured))


def _by_model(
    label: str, dense: Sequence[Wanted], pruned: Sequence[Wanted], measured: Mapping[Key, Measured]
) -> PrintedTable:
    """One size: methods down, models across."""
    models = tuple(cell.model.rsplit("/", maxsplit=1)[-1].removeprefix("mamba2-") for cell in dense)
    what = f"{label} of the state cut" if label.endswith("%") else label
    return PrintedTable(f"state-spaces/mamba2-*, {what}", ("method", "", *models), _rows([*dense, *pruned], measured))


def _rows(cells: Sequence[Wanted], measured: Mapping[Key, Measured]) -> tuple[tuple[str, ...], ...]:
    rows: list[tuple[str, ...]] = []
    for method in dict.fromkeys(cell.method for cell in cells):
        of_method = [cell for cell in cells if cell.method == method]
        rows.append((method, "published", *map(_published_text, of_method)))
        rows.append(("", "measured", *(_measured_text(cell, measured) for cell in of_method)))
    return tuple(rows)


def _size_label(cell: Wanted) -> str:
    return f"N' = {cell.state_size}" if cell.sparsity is None else f"{cell.sparsity:.0%}"


def _published_text(cell: Wanted) -> str:
    return "" if cell.published is None else perplexity_text(cell.published)


def _measured_text(cell: Wanted, measured: Mapping[Key, Measured]) -> str:
    found = measured.get(cell.key)
    return "" if found is None else perplexity_text(found.perplexity)


def perplexity_text(value: float) -> str:
    """With as many digits as the paper gives."""
    if not math.isfinite(value):
        return "inf"
    if value >= 1e6:
        return f"{value:.0e}".replace("e+", "e")
    return f"{value:.{2 if value < 100 else 1 if value < 1000 else 0}f}"


def markdown_page(tables: Sequence[PrintedTable], settings: Settings) -> str:
    """The tables with where they are from and how they were measured."""
    amount = "all windows" if settings.text_windows is None else f"{settings.text_windows} windows"
    lines = [
        "# Published and measured perplexities\n",
        f"Published: {source()}.\n",
        f"Measured: `ghostssm reproduce`, calibrated on {settings.windows} windows of {settings.window_length} tokens "
        f"of {settings.calibration} (seed {settings.seed}), measured on {amount} of {settings.text}. "
        "An empty cell was not measured.\n",
        *(table.markdown for table in tables),
    ]
    return "\n".join(lines)
