"""Reproduce the paper's tables: from a request to measured cells, each on the disk as soon as it is known."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from ghostssm._version import __version__
from ghostssm.checkpoint.description import describe
from ghostssm.checkpoint.loading import check_device, load
from ghostssm.checkpoint.source import find_source
from ghostssm.errors import GhostError, InputError, ModelError, OutputError
from ghostssm.evaluation.perplexity import evaluate, perplexity_of
from ghostssm.files.interrupts import Terminated
from ghostssm.files.outputs import OutputFile
from ghostssm.models.layout import check_state_size
from ghostssm.progress import Notify, Progress, silent, unheard
from ghostssm.pruning.recipe import Recipe
from ghostssm.pruning.run import Calibration
from ghostssm.text.sources import Text, read_text
from ghostssm.text.windows import Windows
from ghostssm.workflows.compare import measure_cell
from ghostssm.workflows.compare_result import DENSE
from ghostssm.workflows.inputs import calibration_windows, windows_of
from ghostssm.workflows.paper_tables import (
    Key,
    PrintedTable,
    Sizes,
    Wanted,
    cells,
    printed_tables,
    published_models,
    published_sizes,
    source,
    tables_named,
)
from ghostssm.workflows.request_checks import check_places, check_request
from ghostssm.workflows.requests import ReproduceRequest

RESULTS_FILE, MARKDOWN_FILE = "results.json", "results.md"
_FORMAT, _VERSION = "ghostssm-reproduction", 1


@dataclass(frozen=True)
class Measured:
    """One finished cell.

    Attributes:
        state_size: N' as asked for. loss: nats per token. windows: how many it was measured on.
        seconds: to calibrate, decide and measure. made_with: versions and device.
    """

    model: str
    method: str
    state_size: int
    loss: float
    windows: int
    seconds: float
    made_with: Mapping[str, str]

    @property
    def key(self) -> Key:
        return self.model, self.method, self.state_size

    @property
    def perplexity(self) -> float:
        return perplexity_of(self.loss)


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
        return printed_tables(self.wanted, {key: cell.perplexity for key, cell in self.measured.items()})

    def as_json(self) -> dict[str, Any]:
        return {"source": source(), "cells": [self._cell_as_json(cell) for cell in self.wanted]}

    def _cell_as_json(self, cell: Wanted) -> dict[str, Any]:
        names = {"measured": "perplexity", "loss": "loss", "seconds": "seconds"}
        result = self.measured.get(cell.key)
        return asdict(cell) | {name: getattr(result, field, None) for name, field in names.items()}


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
    check_request(request)
    check_places(request)
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
        failures = _measure_missing(request, wanted, models, results, texts, progress)
    except (KeyboardInterrupt, Terminated) as stop:
        raise type(stop)(
            f"{len(results.cells)} finished cells are in {results.path}. The same command goes on from there."
        ) from None
    page = Path(request.output) / MARKDOWN_FILE
    outcome = ReproduceOutcome(tuple(wanted), results.cells, failures, (results.path, page))
    _write_whole(page, _markdown_page(outcome.tables, request))
    return outcome


def _checked(request: ReproduceRequest) -> tuple[dict[str, str], list[Wanted]]:
    """The models by published hub id, and the cells to measure.

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


def _markdown_page(tables: Sequence[PrintedTable], request: ReproduceRequest) -> str:
    """The tables in Markdown, with their source and how they were measured."""
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


class Results:
    """The finished cells of a folder, in ``results.json``. A cell is on the disk as soon as it is added.

    Raises:
        OutputError: the folder is a file, holds something else under that name, or results with other settings.
    """

    def __init__(self, request: ReproduceRequest, texts: Mapping[str, Text]):
        folder = Path(request.output)
        self.path = folder / RESULTS_FILE
        # Texts are compared by their characters, not by their names.
        self._settings = request.numbers | {f"{role}_sha256": text.fingerprint for role, text in texts.items()}
        self._names = {f"{role}_text": text.name for role, text in texts.items()}
        self.models: dict[str, str] = {}
        self.cells: dict[Key, Measured] = {}
        if folder.exists() and not folder.is_dir():
            raise OutputError(f"{folder} is a file; expected a folder for the results.")
        self._read()

    def check_model(self, model: str, fingerprint: str) -> None:
        """Raise OutputError if the model's finished cells were measured on other weights."""
        if self.models.setdefault(model, fingerprint) != fingerprint:
            raise OutputError(
                f"{self.path} holds results of {model} with other weights; name another --output, or the same model."
            )

    def add(self, cell: Measured) -> None:
        """Store a finished cell; cells that another process stored meanwhile stay."""
        self._read()
        self.cells[cell.key] = cell
        document = {
            "format": _FORMAT,
            "version": _VERSION,
            "settings": self._settings | self._names,
            "models": self.models,
            "cells": [asdict(cell) for cell in self.cells.values()],
        }
        _write_whole(self.path, json.dumps(document, indent=1) + "\n")

    def _read(self) -> None:
        try:
            document = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            raise OutputError(f"{self.path} can't be read ({error}); move it away, or name another --output.") from None
        if not isinstance(document, dict) or (document.get("format"), document.get("version")) != (_FORMAT, _VERSION):
            raise OutputError(f"{self.path} is not what ghostssm reproduce writes; name another --output.")
        try:
            before = {key: document["settings"].get(key) for key in self._settings}
            models, cells = dict(document["models"]), [Measured(**entry) for entry in document["cells"]]
            finished = {cell.key: cell for cell in cells}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise OutputError(
                f"{self.path} is damaged ({type(error).__name__}: {error}); move it away, or name another --output."
            ) from None
        others = [f"{key} {before[key]}, now {value}" for key, value in self._settings.items() if before[key] != value]
        if others:
            raise OutputError(
                f"{self.path} holds results with other settings ({'; '.join(others)}); "
                "name another --output, or the same settings."
            )
        self.models |= models
        self.cells |= finished


def _write_whole(path: Path, text: str) -> None:
    """Write a text file at one stroke: a reader gets the old one or the new one, even after a power cut.

    Raises:
        OutputError: it can't be written; the old one stays.
    """
    try:
        with OutputFile(path, overwrite=True) as file:
            file.partial.write_text(text, encoding="utf-8")
            file.commit()
    except OSError as error:
        raise OutputError(f"{path} could not be written: {error.strerror or error}.") from error


def find_models(specs: Iterable[str]) -> dict[str, str]:
    """The models that are named, by published hub id.

    Args:
        specs: each is a hub id or its last part, ``mamba2-130m=FOLDER``, a folder with such a name, or a folder that
            holds folders with such names.

    Raises:
        ModelError: something else; says what was expected.
    """
    short = {name.rsplit("/", maxsplit=1)[-1]: name for name in published_models()}
    names = {name: name for name in short.values()} | short
    models: dict[str, str] = {}
    for spec in specs:
        name, equals, place = spec.partition("=")
        folder = Path(spec)
        if equals and name in names:
            models[names[name]] = place
        elif (folder / "config.json").exists() and folder.resolve().name in short:
            models[short[folder.resolve().name]] = spec
        elif inside := {names[name]: str(folder / name) for name in names if (folder / name / "config.json").exists()}:
            models |= inside
        elif spec in names:
            models[names[spec]] = names[spec]
        else:
            raise ModelError(
                f"{spec!r} is none of the published models; expected {', '.join(short)}, one of these as "
                "NAME=FOLDER, or a folder that holds folders of these names."
            )
    return {name: models[name] for name in short.values() if name in models}


def check_models(models: Mapping[str, str]) -> None:
    """Check that each model has the sizes of the published one in whose place it is; only configs are read.

    Raises:
        ModelError: a model that is not there, was pruned before, or is another one.
    """
    for name, spec in models.items():
        try:
            described = describe(spec)
        except ModelError as error:
            hint = f" Here: --models {name}=FOLDER." if spec == name else ""
            raise ModelError(f"{error}{hint}") from error
        if not described.is_stock or described.family != "mamba2":
            raise ModelError(f"{spec} is no stock Mamba-2 model; expected {name}.")
        sizes = Sizes(described.layers, described.layout.hidden_size, described.layout.state_size)
        if sizes != published_sizes(name):
            raise ModelError(
                f"{spec} has {sizes}; expected {published_sizes(name)}, as {name} has. Name that model's folder, or "
                "prune and measure your own with 'ghostssm compare'."
            )


def _measure_missing(
    request: ReproduceRequest,
    wanted: Sequence[Wanted],
    models: Mapping[str, str],
    results: Results,
    texts: Mapping[str, Text],
    progress: Progress = silent,
) -> dict[Key, str]:
    """Measure the wanted cells of the given models that are not among the results; return why cells failed.

    A cell that fails, for lack of memory or because a loss is not finite, is left out; the others go on.

    Args:
        models: MODEL by published hub id. texts: by the roles ``calibration`` and ``evaluation``.

    Raises:
        InputError: a model that can't be loaded, text that is too short.
        OutputError: results of another model under this name, or a folder that can't be written.
    """
    # By model, so that each is loaded once; a cell may stand in both tables.
    keys = {name: dict.fromkeys(cell.key for cell in wanted if cell.model == name) for name in models}
    missing = {name: [key for key in keys[name] if key not in results.cells] for name in models}
    total, done = sum(map(len, missing.values())), 0
    failures: dict[Key, str] = {}
    if total:
        progress("cells", 0, total)
    for name, spec in models.items():
        if missing[name] or Path(spec).is_dir():  # a finished model of the hub is not fetched again to be compared
            results.check_model(name, find_source(spec).fingerprint())
        if not missing[name]:
            continue
        checkpoint = load(spec, dtype=torch.float32, device=request.device, tokenizer=request.tokenizer)
        vocabulary = checkpoint.require_tokenizer()
        held_out = windows_of(request, texts["evaluation"], vocabulary)
        windows = calibration_windows(request, vocabulary, texts["calibration"])
        calibration = Calibration(checkpoint.model, windows)
        for key in missing[name]:
            try:
                cell = _measured(key, calibration, held_out, request.seed, progress)
            except (GhostError, torch.OutOfMemoryError) as error:
                failures[key] = str(error).splitlines()[0]
            else:
                results.add(cell)
            done += 1
            progress("cells", done, total)
    return failures


def _measured(key: Key, calibration: Calibration, held_out: Windows, seed: int, progress: Progress) -> Measured:
    """Prune a model, and measure its loss on the held-out windows."""
    begun = time.perf_counter()
    (_, method, state_size), device = key, calibration.model.device

    def loss_of(model: PreTrainedModel) -> float:
        return evaluate(model, held_out, progress).loss

    if method == DENSE:
        loss = loss_of(calibration.model)
    else:
        cell = (method, state_size)
        loss = measure_cell(calibration, cell, loss_of, groups="pooled", seed=seed, progress=progress).measured
    made_with = {
        "ghostssm": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
    }
    return Measured(*key, loss, len(held_out), round(time.perf_counter() - begun, 1), made_with)
