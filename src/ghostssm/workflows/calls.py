"""The use cases in one call each, of whatever a caller has: names, or models, texts and token ids in memory."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from os import PathLike
from typing import Any, overload

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ghostssm.calibration.blocks import Blocks
from ghostssm.calibration.scratch import Scratch
from ghostssm.checkpoint.loading import Checkpoint, GivenModel, GivenTokenizer, given_checkpoint
from ghostssm.checkpoint.streamed import StreamedCheckpoint
from ghostssm.errors import InputError
from ghostssm.evaluation import perplexity
from ghostssm.evaluation.perplexity import Evaluation
from ghostssm.files.outputs import OutputFolder
from ghostssm.progress import Notify, Progress, listening, on_screen, unheard
from ghostssm.pruning.smallest import held_out_rows
from ghostssm.text.coercion import GivenText, given_windows
from ghostssm.text.sources import is_corpus
from ghostssm.workflows import compare as comparing
from ghostssm.workflows import prune as pruning
from ghostssm.workflows.compare_checks import checked as checked_comparison
from ghostssm.workflows.comparison import Comparison
from ghostssm.workflows.given import Given, asked
from ghostssm.workflows.inputs import Inputs
from ghostssm.workflows.prune_job import PruneOutcome, checked
from ghostssm.workflows.requests import CompareRequest, PruneRequest

_WINDOW_LENGTH = 2048


@overload
def prune(model: PruneRequest, *, progress: Progress | None = on_screen, notify: Notify = unheard) -> PruneOutcome: ...


@overload
def prune(
    model: GivenModel,
    text: GivenText = "wikitext2",
    *,
    output: str | PathLike[str] | None = None,
    evaluate: GivenText | None = None,
    tokenizer: GivenTokenizer | None = None,
    column: str | None = None,
    progress: Progress | None = on_screen,
    notify: Notify = unheard,
    **options: Any,
) -> PruneOutcome: ...


def prune(
    model: GivenModel | PruneRequest,
    text: GivenText = "wikitext2",
    *,
    output: str | PathLike[str] | None = None,
    evaluate: GivenText | None = None,
    tokenizer: GivenTokenizer | None = None,
    column: str | None = None,
    progress: Progress | None = on_screen,
    notify: Notify = unheard,
    **options: Any,
) -> PruneOutcome:
    """Prune a model's state in one call: ``ghostssm.prune(model, text, state_size=64)``.

    A model in memory stays as it was; the outcome has the pruned one.

    Args:
        model: a hub id, a folder, ``reference``, a transformers model in memory, or a loaded `Checkpoint`; or a
            `PruneRequest`, which says all the rest.
        text: to calibrate on: a corpus (``wikitext2``, ``stdlib``), a path, a string or strings of text, a
            ``datasets.Dataset``, or token ids in a tensor, an array or `Windows`.
        output: the folder to write; if not given, the result stays in memory.
        evaluate: what to measure the loss on, dense and pruned; as ``text``.
        tokenizer: of a model in memory, or to take in place of a model's own.
        column: of a data set: the one with the text.
        progress: told how far the work is; a terminal or notebook shows it if not given; None for nobody.
        notify: told what a person should know, in sentences.
        options: ``state_size``, ``budget``, ``max_excess_loss`` or ``state_bytes``, and any other field of
            `PruneRequest`, such as ``recipe``, ``windows`` and ``window_length``.

    Raises:
        InputError: a fault of the arguments, found before the work where it can be; says what was expected.
        NumericalError: numbers that are not finite, or that the stored dtype can't hold; names the layer.
        StorageError: writing failed; nothing half-written is left, and what a streamed run has done can be resumed.
        IncompleteError: the checkpoint is written, but something is missing beside its weights.
        HubError: the upload failed; what was to be uploaded is on the disk.
    """
    with listening(progress) as tell:
        if isinstance(model, PruneRequest):
            return pruning.prune(model, progress=tell, notify=notify)
        given = Given(model, text, evaluate, tokenizer, column, options.get("device"))
        names = {"model": given.name("model"), "calibration": given.name("text"), "evaluate": given.name("evaluate")}
        if not {"state_size", "budget", "max_excess_loss", "state_bytes"} & options.keys():
            raise InputError("Say how much to keep: ghostssm.prune(model, text, state_size=64).")
        place = None if output is None else str(output)
        request = asked(PruneRequest, options, **names, output=place, tokenizer=given.name("tokenizer"))
        if given.is_named:
            return pruning.prune(request, progress=tell, notify=notify)
        return _pruned(given, request, tell, notify)


def _pruned(given: Given, request: PruneRequest, progress: Progress, notify: Notify) -> PruneOutcome:
    """Carry a request out on what is at hand."""
    if request.stream:
        raise InputError("A streamed run reads model and texts from files; give their names, or leave out stream.")
    folder = None if request.output is None else OutputFolder(request.output, request.overwrite)
    job = checked(request, notify, given.described())
    checkpoint = given.opened()
    held_out = None if given.evaluate is None else given.held_out(checkpoint, request)
    windows = given.calibration(checkpoint, request)
    request = dataclasses.replace(
        request,
        model=checkpoint.source.published_name,
        calibration=windows.text_name,
        evaluate=None if held_out is None else held_out.text_name,
        windows=len(windows),
        window_length=windows.length,
        device=str(checkpoint.model.device),
    )
    if given.is_at_hand:
        checkpoint = Checkpoint(copy.deepcopy(checkpoint.model), checkpoint.tokenizer, checkpoint.source)
    job, inputs = dataclasses.replace(job, request=request), Inputs(checkpoint, windows, held_out)
    return pruning.prune_on(job, inputs, folder, progress, notify)


@overload
def compare(
    model: CompareRequest, *, progress: Progress | None = on_screen, notify: Notify = unheard
) -> Comparison: ...


@overload
def compare(
    model: GivenModel,
    text: GivenText = "wikitext2",
    state_sizes: int | Sequence[int] = (),
    methods: str | Sequence[str] = (),
    *,
    evaluate: GivenText | None = None,
    tokenizer: GivenTokenizer | None = None,
    column: str | None = None,
    progress: Progress | None = on_screen,
    notify: Notify = unheard,
    **options: Any,
) -> Comparison: ...


def compare(
    model: GivenModel | CompareRequest,
    text: GivenText = "wikitext2",
    state_sizes: int | Sequence[int] = (),
    methods: str | Sequence[str] = (),
    *,
    evaluate: GivenText | None = None,
    tokenizer: GivenTokenizer | None = None,
    column: str | None = None,
    progress: Progress | None = on_screen,
    notify: Notify = unheard,
    **options: Any,
) -> Comparison:
    """Prune by every method to every size, and measure loss, state and decode speed; the model stays as it was.

    ``ghostssm.compare(model, text, state_sizes=[96, 64], methods=["ghost", "output+repair"])``

    Args:
        model: as `ghostssm.prune` has it; or a `CompareRequest`, which says all the rest.
        text: as `ghostssm.prune` has it.
        state_sizes: N' to prune to, one or several.
        methods: recipes, one or several; all methods that the model's family has if not given.
        evaluate: what to measure the losses on; as ``text``. If not given, the other side of a named corpus, or every
            fourth of the windows that are cut from ``text``, which then don't calibrate.
        tokenizer: of a model in memory, or to take in place of a model's own.
        column: of a data set: the one with the text.
        progress: told how far the work is; a terminal or notebook shows it if not given; None for nobody.
        notify: told what a person should know, in sentences.
        options: any other field of `CompareRequest`, such as ``state_bytes`` in place of ``state_sizes``, ``windows``,
            ``window_length`` and ``batches``.

    Raises:
        InputError: a fault of the arguments, found before the work where it can be; says what was expected.
        NumericalError: numbers that are not finite; names the layer.
    """
    with listening(progress) as tell:
        if isinstance(model, CompareRequest):
            return comparing.compare(model, progress=tell, notify=notify)
        device = options.get("device")
        given = Given(model, text, evaluate, tokenizer, column, device, torch.float32)
        request = asked(
            CompareRequest,
            options,
            model=given.name("model"),
            calibration=given.name("text"),
            text=given.name("evaluate") or given.name("text"),
            tokenizer=given.name("tokenizer"),
            state_sizes=[state_sizes] if isinstance(state_sizes, int) else list(state_sizes),
            methods=[methods] if isinstance(methods, str) else list(methods),
        )
        if not (request.state_sizes or request.state_bytes):
            raise InputError("Say how much to keep: ghostssm.compare(model, text, state_sizes=[96, 64]).")
        if given.is_named and (evaluate is not None or is_corpus(text)):
            return comparing.compare(request, progress=tell, notify=notify)
        return _compared(given, request, tell, notify)


def _compared(given: Given, request: CompareRequest, progress: Progress, notify: Notify) -> Comparison:
    """Carry a request out on what is at hand."""
    request, description = checked_comparison(request, given.described())
    checkpoint = given.opened()
    windows = given.calibration(checkpoint, request)
    if given.evaluate is None and is_corpus(given.text):
        given = dataclasses.replace(given, evaluate=given.text)
    if given.evaluate is not None:
        held_out = given.held_out(checkpoint, request)
    elif (apart := held_out_rows(len(windows))).any():
        windows, held_out = windows.part(~apart), windows.part(apart)
    else:
        raise InputError(f"There is {len(windows)} window, none to measure on; give more text, or evaluate=.")
    request = dataclasses.replace(
        request,
        model=checkpoint.source.published_name,
        calibration=windows.text_name,
        text=held_out.text_name,
        windows=len(windows),
        window_length=windows.length,
        device=str(checkpoint.model.device),
    )
    return comparing.compare_at_hand(Inputs(checkpoint, windows, held_out), request, description, progress, notify)


def evaluate(
    model: GivenModel | StreamedCheckpoint | Blocks,
    text: GivenText,
    progress: Progress | None = on_screen,
    scratch: Scratch | None = None,
    *,
    windows: int | None = None,
    window_length: int = _WINDOW_LENGTH,
    tokenizer: GivenTokenizer | None = None,
    column: str | None = None,
    device: str | None = None,
) -> Evaluation:
    """The loss of a model on every window of a text: ``ghostssm.evaluate(model, text)``.

    What is loaded by its name is measured in float32, a model in memory as it is.

    Args:
        model: as `ghostssm.prune` has it; or a streamed checkpoint or its blocks, of which each takes all windows in
            turn, so that memory holds one of them and the hidden states of all windows.
        text: as `ghostssm.prune` has it; of a named corpus the side to evaluate on. `Windows` are taken as they are.
        progress: told how far the work is; a terminal or notebook shows it if not given; None for nobody.
        scratch: the room for the hidden states of a streamed model; memory if not given.
        windows: to measure on, drawn at random but the same in every run; all if not given.
        window_length: tokens in each, of a text.
        tokenizer: of a model in memory, or to take in place of a model's own.
        column: of a data set: the one with the text.
        device: where to load a named model to; the CPU if not given.

    Raises:
        InputError: a fault of the arguments; says what was expected.
        NumericalError: a loss that is not finite.
    """
    opened: Any
    if isinstance(model, StreamedCheckpoint):
        opened, known = model.blocks, model.tokenizer
    elif hasattr(model, "opened"):
        opened, known = model, None
    else:
        checkpoint = given_checkpoint(model, tokenizer, dtype=torch.float32, device=device)
        opened, known = checkpoint.model, checkpoint.tokenizer
    vocabulary = tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else known
    config = opened.config if isinstance(opened, PreTrainedModel) else opened.model.config
    cut = given_windows(
        text,
        vocabulary,
        window_length,
        windows,
        role="evaluation",
        column=column,
        vocab_size=config.vocab_size,
    )
    with listening(progress) as tell:
        return perplexity.evaluate(opened, cut, tell, scratch)
