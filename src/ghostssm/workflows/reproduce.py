"""Reproduce the paper's tables: from a request to the measured cells beside the published ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ghostssm.checkpoint.loading import check_device
from ghostssm.errors import InputError
from ghostssm.files.interrupts import Terminated
from ghostssm.models.layout import check_state_size
from ghostssm.progress import Notify, Progress, silent, unheard
from ghostssm.pruning.recipe import Recipe
from ghostssm.text.sources import read_text
from ghostssm.workflows.comparison import DENSE
from ghostssm.workflows.published import Wanted, cells, published_models, published_sizes, source, tables_named
from ghostssm.workflows.reproduction import (
    Key,
    Measured,
    Results,
    check_models,
    find_models,
    measure,
    write_whole,
)
from ghostssm.workflows.reproduction_table import PrintedTable, markdown_page, printed_tables
from ghostssm.workflows.requests import ReproduceRequest

MARKDOWN_FILE = "results.md"


@dataclass(frozen=True)
class ReproduceOutcome:
    """What became of the wanted cells of the tables.

    Attributes:
        wanted: the cells that were asked for.
        measured: of these, the cells that are measured, now or before.
        failures: why cells could not be measured; the same request tries them again.
        written: the files with the results.
    """

    wanted: tuple[Wanted, ...]
    measured: Mapping[Key, Measured]
    failures: Mapping[Key, str]
    written: tuple[Path, ...]

    @property
    def tables(self) -> list[PrintedTable]:
        return printed_tables(self.wanted, self.measured)

    def as_json(self) -> dict[str, Any]:
        return {"source": source(), "cells": [self._cell_as_json(cell) for cell in self.wanted]}

    def _cell_as_json(self, cell: Wanted) -> dict[str, Any]:
        found = self.measured.get(cell.key)
        results = (None, None, None) if found is None else (found.perplexity, found.loss, found.seconds)
        return asdict(cell) | dict(zip(("measured", "loss", "seconds"), results, strict=True))


def reproduce(request: ReproduceRequest, *, progress: Progress = silent, notify: Notify = unheard) -> ReproduceOutcome:
    """Measure the paper's tables on the published checkpoints: what ``ghostssm reproduce`` does, in one call.

    Every finished cell is on the disk at once, and the same request goes on from there.

    Args:
        request: the models, tables, methods and texts.
        progress: told how far the work is.
        notify: told what a person should know, in sentences.

    Raises:
        InputError: a fault of the request or of what it names, found before anything is loaded where it can be.
        OutputError: the folder holds other results, or can't be written.
    """
    check_device(request.device)
    models, wanted = _checked(request)
    texts = {
        "calibration": read_text(request.calibration, "calibration"),
        "evaluation": read_text(request.text, "evaluation"),
    }
    results = Results(request, texts)
    if results.cells:
        notify(f"going on from {len(results.cells)} finished cells in {results.path}")
    try:
        failures = measure(request, wanted, models, results, texts, progress)
    except (KeyboardInterrupt, Terminated) as stop:
        raise type(stop)(
            f"{len(results.cells)} finished cells are in {results.path}. The same command goes on from there."
        ) from None
    page = Path(request.output) / MARKDOWN_FILE
    outcome = ReproduceOutcome(tuple(wanted), results.cells, failures, (results.path, page))
    write_whole(page, markdown_page(outcome.tables, request))
    return outcome


def _checked(request: ReproduceRequest) -> tuple[dict[str, str], list[Wanted]]:
    """MODEL by published hub id, and the cells to measure.

    Raises:
        InputError: an unknown table or method, or a model or size that does not belong in the tables.
    """
    tables = tables_named(request.tables)
    recipes = [str(Recipe.parse(method)) for method in request.methods]
    models = find_models(request.models or published_models(tables))
    if not request.tables:  # of both tables, those that the models at hand stand in
        tables = tuple(name for name in tables if models.keys() & set(published_models([name])))
    check_models(models)
    wanted = [cell for name in tables for cell in cells(name, recipes, request.state_sizes)]
    if not any(cell.model in models for cell in wanted):
        raise InputError(f"None of the named models is in the table {' or '.join(tables)}; name others, or no --table.")
    for cell in wanted:
        if cell.model in models and cell.method != DENSE:
            check_state_size(cell.state_size, published_sizes(cell.model).state_size)
    return models, wanted
