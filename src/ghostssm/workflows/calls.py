"""Use cases in one call each; the caller gives names, or models, texts and token ids in memory."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from os import PathLike
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ghostssm.calibration.blocks import Blocks
from ghostssm.calibration.scratch import Scratch
from ghostssm.checkpoint.description import Description, described
from ghostssm.checkpoint.loading import Checkpoint, GivenModel, GivenTokenizer, given_checkpoint, is_in_memory
from ghostssm.checkpoint.streamed import StreamedCheckpoint
from ghostssm.errors import InputError, unknown_name
from ghostssm.evaluation import perplexity
from ghostssm.evaluation.perplexity import Evaluation
from ghostssm.files.outputs import OutputFolder
from ghostssm.progress import Notify, Progress, listening, on_screen, unheard
from ghostssm.pruning.search import held_out_rows
from ghostssm.text.coercion import GivenText, check_there, given_windows, is_name
from ghostssm.text.sources import is_corpus
from ghostssm.text.windows import Windows
from ghostssm.values import short
from ghostssm.workflows import compare as comparing
from ghostssm.workflows import prune as pruning
from ghostssm.workflows.compare_result import Comparison
from ghostssm.workflows.inputs import Inputs
from ghostssm.workflows.options import called_with, options_of
from ghostssm.workflows.prune_checks import PruneOutcome, checked
from ghostssm.workflows.request_checks import AMOUNTS
from ghostssm.workflows.requests import CalibratingRequest, CompareRequest, PruneRequest, Request

_WINDOW_LENGTH = 2048
Asked = TypeVar("Asked", bound=Request)


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
            _check_alone(model, text, output=output, evaluate=evaluate, tokenizer=tokenizer, column=column, **options)
            return pruning.prune(model, progress=tell, notify=notify)
        given = _Given(model, text, evaluate, tokenizer, column, options.get("device"))
        names = {"model": given.name("model"), "calibration": given.name("text"), "evaluate": given.name("evaluate")}
        place = None if output is None else str(output)
        request = _asked(PruneRequest, options, **names, output=place, tokenizer=given.name("tokenizer"))
        if not options.keys() & set(AMOUNTS):
            raise InputError("Say how much to keep: ghostssm.prune(model, text, state_size=64).")
        if given.is_named:
            return pruning.prune(request, progress=tell, notify=notify)
        return _pruned(given, request, tell, notify)


def _pruned(given: _Given, request: PruneRequest, progress: Progress, notify: Notify) -> PruneOutcome:
    """Carry a request out on what the caller gave."""
    if request.stream:
        raise InputError("A streamed run reads model and texts from files; give their names, or leave out stream.")
    folder = None if request.output is None else OutputFolder(request.output, request.overwrite)
    job = checked(request, notify, given.described())
    checkpoint = given.opened()
    held_out = None if given.evaluate is None else given.held_out(checkpoint, request)
    windows = given.calibration(checkpoint, request)
    measured_on = None if held_out is None else held_out.text_name
    request = replace(request, **_names_of(checkpoint, windows), evaluate=measured_on)
    if given.is_at_hand:
        checkpoint = Checkpoint(copy.deepcopy(checkpoint.model), checkpoint.tokenizer, checkpoint.source)
    job, inputs = replace(job, request=request), Inputs(checkpoint, windows, held_out)
    return pruning.prune_on(job, inputs, folder, progress, notify)


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
            beside = {"state_sizes": state_sizes or None, "methods": methods or None, **options}
            _check_alone(model, text, evaluate=evaluate, tokenizer=tokenizer, column=column, **beside)
            return comparing.compare(model, progress=tell, notify=notify)
        given = _Given(model, text, evaluate, tokenizer, column, options.get("device"), torch.float32)
        request = _asked(
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


def _compared(given: _Given, request: CompareRequest, progress: Progress, notify: Notify) -> Comparison:
    """Carry a request out on what the caller gave."""
    request, description = comparing.checked(request, given.described())
    checkpoint = given.opened()
    windows = given.calibration(checkpoint, request)
    if given.evaluate is None and is_corpus(given.text):
        given = replace(given, evaluate=given.text)
    if given.evaluate is not None:
        held_out = given.held_out(checkpoint, request)
    elif (apart := held_out_rows(len(windows))).any():
        windows, held_out = windows.part(~apart), windows.part(apart)
    else:
        raise InputError(f"There is {len(windows)} window, none to measure on; give more text, or evaluate=.")
    request = replace(request, **_names_of(checkpoint, windows), text=held_out.text_name)
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


@dataclass(frozen=True)
class _Given:
    """What a caller gave in place of names."""

    model: GivenModel
    text: GivenText
    evaluate: GivenText | None
    tokenizer: GivenTokenizer | None
    column: str | None
    device: str | None
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        check_there(self.text)
        check_there(self.evaluate)

    @property
    def is_at_hand(self) -> bool:
        """Whether the model is in memory."""
        return is_in_memory(self.model)

    @property
    def is_named(self) -> bool:
        """Whether all of it has names, so that a request can say it."""
        texts = all(text is None or is_name(text) for text in (self.text, self.evaluate))
        own = self.tokenizer is None or isinstance(self.tokenizer, str | PathLike)
        return texts and own and not self.is_at_hand and self.column is None

    def name(self, field: str) -> str | None:
        """What a request calls a field: its name; of a value in memory a few words, until it is opened."""
        value = getattr(self, field)
        return None if value is None else str(value) if isinstance(value, str | PathLike) else short(value)

    def described(self) -> Description | None:
        """The description of the model, if it is in memory."""
        if not self.is_at_hand:
            return None
        checkpoint = self.opened()
        return described(checkpoint.model, checkpoint.source.name, checkpoint.source)

    def opened(self) -> Checkpoint:
        return given_checkpoint(self.model, self.tokenizer, dtype=self.dtype, device=self.device)

    def calibration(self, checkpoint: Checkpoint, request: CalibratingRequest) -> Windows:
        """The windows to calibrate on."""
        return self._windows(self.text, checkpoint, request, request.windows, seed=request.seed)

    def held_out(self, checkpoint: Checkpoint, request: CalibratingRequest) -> Windows:
        """The windows to measure the loss on."""
        assert self.evaluate is not None
        return self._windows(self.evaluate, checkpoint, request, request.text_windows, role="evaluation")

    def _windows(
        self, text: GivenText, checkpoint: Checkpoint, request: Request, count: int | None, **how: Any
    ) -> Windows:
        size = checkpoint.model.config.vocab_size
        tables = [each for each in (self.text, self.evaluate) if hasattr(each, "column_names")]
        column = self.column if not tables or hasattr(text, "column_names") else None
        return given_windows(
            text, checkpoint.tokenizer, request.window_length, count, column=column, vocab_size=size, **how
        )


def _asked(kind: type[Asked], options: Mapping[str, Any], **named: Any) -> Asked:
    """The request that a caller's options make; raises InputError for an option that it does not have."""
    own = [each.name for each in fields(kind)]
    free = [name for name in own if name not in named]
    for name in options:
        if name not in free:
            raise unknown_name("option", name, [*free, "text", "evaluate", "column"])
    several = {each.name for each in options_of(kind) if each.is_several}  # type: ignore[arg-type]
    lists = {
        name: [value] for name, value in options.items() if name in several and not isinstance(value, list | tuple)
    }
    return called_with(kind, named | dict(options) | lists)


def _check_alone(request: Request, text: GivenText, **others: Any) -> None:
    """Raise InputError for arguments beside a request: they would have no effect."""
    given = [name for name, value in others.items() if value is not None]
    given += [] if isinstance(text, str) and text == "wikitext2" else ["text"]
    if given:
        raise InputError(f"A {type(request).__name__} says everything; leave {', '.join(given)} out.")


def _names_of(checkpoint: Checkpoint, windows: Windows) -> dict[str, Any]:
    """The fields of a request that name a model and the windows to calibrate on."""
    return {
        "model": checkpoint.source.published_name,
        "calibration": windows.text_name,
        "windows": len(windows),
        "window_length": windows.length,
        "device": str(checkpoint.model.device),
    }
