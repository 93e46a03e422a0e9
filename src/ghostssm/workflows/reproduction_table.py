"""The paper's tables with the published and the measured perplexities above one another."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ghostssm.workflows.comparison import DENSE
from ghostssm.workflows.published import Wanted, source
from ghostssm.workflows.reproduction import Key, Measured
from ghostssm.workflows.requests import ReproduceRequest


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
    texts = {
        cell.key: perplexity_text(result.perplexity)
        for cell in wanted
        if (result := measured.get(cell.key)) is not None
    }
    tables = []
    for dense in (cell for cell in wanted if cell.table == "sparsity" and cell.method == DENSE):  # there is one model
        cells = [cell for cell in wanted if cell.table == "sparsity" and cell.method != DENSE]
        title = f"{dense.model}, dense: {_published_text(dense)} published"
        title += f", {texts[dense.key]} measured" if dense.key in texts else ""
        tables.append(PrintedTable(title, ("method", "", *dict.fromkeys(map(_size, cells))), _rows(cells, texts)))
    by_model = [cell for cell in wanted if cell.table == "size"]
    for size in dict.fromkeys(_size(cell) for cell in by_model if cell.method != DENSE):
        cells = [cell for cell in by_model if cell.method == DENSE or _size(cell) == size]
        title = f"state-spaces/mamba2-*, {size}{' of the state cut' if size.endswith('%') else ''}"
        models = dict.fromkeys(cell.model.rpartition("/")[2].removeprefix("mamba2-") for cell in cells)
        tables.append(PrintedTable(title, ("method", "", *models), _rows(cells, texts)))
    return tables


def _size(cell: Wanted) -> str:
    return f"N' = {cell.state_size}" if cell.sparsity is None else f"{cell.sparsity:.0%}"


def _rows(cells: Sequence[Wanted], measured: Mapping[Key, str]) -> tuple[tuple[str, ...], ...]:
    rows: list[tuple[str, ...]] = []
    for method in dict.fromkeys(cell.method for cell in cells):
        of_method = [cell for cell in cells if cell.method == method]
        rows.append((method, "published", *map(_published_text, of_method)))
        rows.append(("", "measured", *(measured.get(cell.key, "") for cell in of_method)))
    return tuple(rows)


def _published_text(cell: Wanted) -> str:
    return "" if cell.published is None else perplexity_text(cell.published)


def perplexity_text(value: float) -> str:
    """With as many digits as the paper gives."""
    if not math.isfinite(value):
        return "inf"
    if value >= 1e6:
        return f"{value:.0e}".replace("e+", "e")
    return f"{value:.{2 if value < 100 else 1 if value < 1000 else 0}f}"


def markdown_page(tables: Sequence[PrintedTable], request: ReproduceRequest) -> str:
    """The tables with where they are from and how they were measured."""
    amount = "all windows" if request.text_windows is None else f"{request.text_windows} windows"
    lines = [
        "# Published and measured perplexities\n",
        f"Published: {source()}.\n",
        f"Measured: `ghostssm reproduce`, calibrated on {request.windows} windows of {request.window_length} tokens "
        f"of {request.calibration} (seed {request.seed}), measured on {amount} of {request.text}. "
        "An empty cell was not measured.\n",
        *(table.markdown for table in tables),
    ]
    return "\n".join(lines)
