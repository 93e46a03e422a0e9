"""The paper's two tables of perplexities, and the cells that they are made of."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

from ghostssm.errors import InputError

TableName = Literal["sparsity", "size"]
"""One model at several sparsities; several models at one."""
DENSE = "dense"


@dataclass(frozen=True)
class Wanted:
    """One cell of a table.

    Attributes:
        table: the table that it stands in.
        model: the published checkpoint's hub id.
        method: a recipe, or ``dense``.
        state_size: N' to prune to; the model's own N for ``dense``.
        sparsity: the share of the state that goes, as the table has it; None for a state size of the user's.
        published: perplexity, None where the paper has none.
    """

    table: TableName
    model: str
    method: str
    state_size: int
    sparsity: float | None
    published: float | None

    @property
    def key(self) -> tuple[str, str, int]:
        """What has to be measured; the same cell may stand in both tables."""
        return self.model, self.method, self.state_size


@dataclass(frozen=True)
class Sizes:
    """What tells the published checkpoints apart."""

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
    """Of a published checkpoint, by its hub id."""
    return Sizes(**_document()["models"][model])


def table_names() -> tuple[TableName, ...]:
    return tuple(_document()["tables"])


def tables_named(names: Sequence[str] | None) -> tuple[TableName, ...]:
    """Tables by name, all if none is given; raises InputError for an unknown one."""
    for name in names or ():
        if name not in table_names():
            raise InputError(f"There is no table {name!r}; expected one of: {', '.join(table_names())}.")
    return tuple(name for name in table_names() if not names or name in names)


def published_models(tables: Sequence[TableName] | None = None) -> tuple[str, ...]:
    """Hub ids of the models in some tables, in all if not given, smallest first."""
    found = _document()["tables"]
    wanted = {model for name in tables or table_names() for model in found[name]["models"]}
    return tuple(model for model in found["size"]["models"] if model in wanted)


def cells(
    table: TableName, methods: Sequence[str] | None = None, state_sizes: Sequence[int] | None = None
) -> list[Wanted]:
    """The cells of a table, dense ones first, then method by method.

    Args:
        methods: recipes; the paper's if not given. state_sizes: N' in place of the table's sparsities.
    """
    found = _document()["tables"][table]
    models, sparsities = found["models"], found["sparsities"]
    own = {model: published_sizes(model).state_size for model in models}
    wanted = [
        Wanted(table, model, DENSE, own[model], None, dense)
        for model, dense in zip(models, found["dense"], strict=True)
    ]
    for method in methods or found["methods"]:
        numbers = found["methods"].get(method, [None] * max(len(models), len(sparsities)))
        of_paper = [
            (model, _state_size(own[model], sparsity), sparsity, numbers[row + column])
            for row, model in enumerate(models)
            for column, sparsity in enumerate(sparsities)
        ]
        by_place = {(model, r): number for model, r, _, number in of_paper}
        places = of_paper
        if state_sizes:
            places = [(model, r, None, by_place.get((model, r))) for r in state_sizes for model in models]
        wanted += [Wanted(table, model, method, r, sparsity, number) for model, r, sparsity, number in places]
    return wanted


def _state_size(state_size: int, sparsity: float) -> int:
    """N' at a sparsity; the paper does not say how it rounds."""
    return max(1, round(state_size * (1 - sparsity)))
