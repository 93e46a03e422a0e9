"""``ghostssm reproduce``: the paper's tables, published and measured."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ghostssm.cli import arguments, completion
from ghostssm.cli.console import note, print_json, print_table, progress_reporter
from ghostssm.files.interrupts import Terminated

if TYPE_CHECKING:
    from ghostssm.workflows.published import Wanted
    from ghostssm.workflows.reproduction import Measured

MARKDOWN_FILE = "results.md"


def reproduce(
    output: Annotated[
        str,
        typer.Option(
            "--output", metavar="DIR", help="Folder for results.json and results.md. A run that stopped goes on there."
        ),
    ],
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--models",
            metavar="NAME ...",
            help="Names from mamba2-130m to mamba2-2.7b are fetched from the hub. NAME=FOLDER takes a local one; a "
            "folder alone has folders of these names. If not given: all five from the hub.",
            autocompletion=completion.published_models,
        ),
    ] = None,
    table: Annotated[
        list[str] | None,
        typer.Option(
            "--table",
            metavar="NAME ...",
            help="'sparsity': the 1.3b model cut by 10 to 90%. 'size': all models cut by half.",
            callback=arguments.tables_known,
            autocompletion=completion.tables,
        ),
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--methods",
            metavar="RECIPE ...",
            help="Methods or recipes, as for compare. If not given: those of the paper.",
            callback=arguments.recipes_known,
            autocompletion=completion.methods,
        ),
    ] = None,
    state_size: Annotated[
        list[int] | None,
        typer.Option("--state-size", metavar="N' ...", help="State sizes N' to prune to, in place of the paper's."),
    ] = None,
    calibration: arguments.CalibrationText = "",
    text: arguments.EvaluationText = "",
    windows: arguments.CalibrationWindows = 128,
    text_windows: arguments.EvaluationWindows = None,
    window_length: arguments.WindowLength = 2048,
    seed: arguments.Seed = 42,
    tokenizer: arguments.Tokenizer = None,
    device: arguments.Device = "cpu",
    as_json: arguments.AsJson = False,
) -> None:
    """Measure the paper's two tables on the published checkpoints, beside the published numbers.

    ghostssm reproduce --output reproduction --device cuda
    ghostssm reproduce --output quick --models mamba2-130m --windows 32
    """
    from ghostssm.checkpoint.loading import check_device
    from ghostssm.errors import GhostError, InputError
    from ghostssm.pruning.recipe import Recipe
    from ghostssm.workflows import reproduction as library
    from ghostssm.workflows.published import cells, published_models, source, tables_named
    from ghostssm.workflows.reproduction_table import markdown_page, printed_tables

    check_device(device)
    arguments.check_separated("--methods", methods)
    tables = tables_named(table)
    recipes = [str(Recipe.parse(method)) for method in methods] if methods else None
    settings = library.Settings(calibration, text, windows, text_windows, window_length, seed)
    found = library.find_models(models or published_models(tables))
    if not table:  # of both tables, those that the models at hand stand in
        tables = tuple(name for name in tables if found.keys() & set(published_models([name])))
    library.check_models(found)
    wanted = [cell for name in tables for cell in cells(name, recipes, state_size)]
    if not any(cell.model in found for cell in wanted):
        raise InputError(f"None of the named models is in the table {' or '.join(tables)}; name others, or no --table.")
    texts = library.read_texts(settings)
    results = library.Results(output, settings, texts)
    if results.cells:
        note(f"going on from {len(results.cells)} finished cells in {results.path}")
    try:
        with progress_reporter() as progress:
            failures = library.measure(
                wanted, found, results, texts, settings, device=device, tokenizer=tokenizer, progress=progress
            )
    except (KeyboardInterrupt, Terminated) as stop:
        raise type(stop)(
            f"{len(results.cells)} finished cells are in {results.path}. The same command goes on from there."
        ) from None

    drawn = printed_tables(wanted, results.cells)
    library.write_whole(Path(output) / MARKDOWN_FILE, markdown_page(drawn, settings))
    if as_json:
        entries = [_as_json(cell, results.cells.get(cell.key)) for cell in wanted]
        print_json({"source": source(), "output": output, "cells": entries})
    else:
        for one in drawn:
            print(one.title)
            print_table(one.headers, one.rows, text_columns=2)
            print()
        print(f"published: {source()}")
        print(f"written: {results.path}, {Path(output) / MARKDOWN_FILE}")
    if failures:
        listed = "".join(f"\n  - {' '.join(map(str, key))}: {reason}" for key, reason in failures.items())
        raise GhostError(f"{len(failures)} cells could not be measured; the same command tries them again:{listed}")


def _as_json(cell: Wanted, measured: Measured | None) -> dict[str, object]:
    results: dict[str, object] = {"measured": None, "loss": None, "seconds": None}
    if measured is not None:
        results = {"measured": measured.perplexity, "loss": measured.loss, "seconds": measured.seconds}
    return dataclasses.asdict(cell) | results
