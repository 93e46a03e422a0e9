"""The paper's two tables of perplexities: their cells, the published numbers, and both printed beside measured ones."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

from ghostssm.errors import unknown_name
from ghostssm.workflows.compare_result import DENSE

TableName = Literal["sparsity", "size"]
"""One model at several sparsities; several models at one."""
Key = tuple[str, str, int]
"""A model, a method and a state size."""


@dataclass(frozen=True)
class Wanted:
    """One cell of a table.

    Attributes:
        table: the table that it stands in.
        model: the published checkpoint's hub id.
        method: a recipe, or ``dense``.
        sparsity: the share of the state that goes, as the table has it; None for a state size of the user's.
        state_size: N' to prune to; the model's own N for ``dense``.
        published: perplexity, None where the paper has none.
    """

    table: TableName
    model: str
    method: str
    sparsity: float | None
    state_size: int
    published: float | None

    @property
    def key(self) -> Key:
        """What has to be measured; the same cell may stand in both tables."""
        return self.model, self.method, self.state_size


@dataclass(frozen=True)
class Sizes:
    """The sizes by which the published checkpoints are told apart."""

    layers: int
    hidden_size: int
    state_size: int

    def __str__(self) -> str:
        return f"{self.layers} layers, hidden size {self.hidden_size} and N = {self.state_size}"


@cache
def _document() -> Mapping[str, Any]:
    path = resources.files("ghostssm.workflows") / "published.json"
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


def source() -> str:
    """Where the numbers are from."""
    return str(_document()["source"])


def published_sizes(model: str) -> Sizes:
    """The sizes of a published checkpoint, by its hub id."""
    return Sizes(**_document()["models"][model])


def table_names() -> tuple[TableName, ...]:
    return tuple(_document()["tables"])


def tables_named(names: Sequence[str] | None) -> tuple[TableName, ...]:
    """Tables by name, all if none is given; raises InputError for an unknown one."""
    for name in names or ():
        if name not in table_names():
            raise unknown_name("table", name, table_names())
    return tuple(name for name in table_names() if not names or name in names)


def published_models(tables: Sequence[TableName] | None = None) -> tuple[str, ...]:
    """Hub ids of the models in some tables, in all if not given, smallest first."""
    all_tables = _document()["tables"]
    wanted = {model for name in tables or all_tables for model in all_tables[name]["models"]}
    return tuple(model for model in all_tables["size"]["models"] if model in wanted)


def cells(
    table: TableName, methods: Sequence[str] | None = None, state_sizes: Sequence[int] | None = None
) -> list[Wanted]:
    """The cells of a table, dense ones first, then method by method.

    Args:
        methods: recipes; the paper's if not given. state_sizes: N' in place of the table's sparsities.
    """
    numbers = _document()["tables"][table]
    sizes = {model: published_sizes(model).state_size for model in numbers["models"]}
    wanted = [
        Wanted(table, model, DENSE, None, sizes[model], dense)
        for model, dense in zip(sizes, numbers["dense"], strict=True)
    ]
    places = [(model, sparsity) for model in sizes for sparsity in numbers["sparsities"]]
    for method in methods or numbers["methods"]:
        # The paper does not say how it rounds N'.
        row = [
            Wanted(table, model, method, sparsity, max(1, round(sizes[model] * (1 - sparsity))), number)
            for (model, sparsity), number in zip(
                places, numbers["methods"].get(method, [None] * len(places)), strict=True
            )
        ]
        if state_sizes:
            known = {cell.key: cell.published for cell in row}
            row = [
                Wanted(table, model, method, None, size, known.get((model, method, size)))
                for size in state_sizes
                for model in sizes
            ]
        wanted += row
    return wanted


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


def printed_tables(wanted: Sequence[Wanted], measured: Mapping[Key, float]) -> list[PrintedTable]:
    """Each table that cells were taken from; one per state size where models are the columns.

    Args:
        measured: perplexities of the cells that were measured.
    """
    texts = {key: perplexity_text(value) for key, value in measured.items()}
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
    """A perplexity with as many digits as the paper gives."""
    if not math.isfinite(value):
        return "inf"
    if value >= 1e6:
        return f"{value:.0e}".replace("e+", "e")
    return f"{value:.{2 if value < 100 else 1 if value < 1000 else 0}f}"
