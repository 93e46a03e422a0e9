"""Measure a model: its loss on a text, beside another's, its recall, or tasks of lm-evaluation-harness."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from ghostssm.calibration.scratch import Scratch
from ghostssm.checkpoint.description import chosen_state_dtype
from ghostssm.checkpoint.loading import Checkpoint, check_device, load, model_config
from ghostssm.checkpoint.manifest import Manifest
from ghostssm.checkpoint.source import Source, find_source
from ghostssm.checkpoint.streamed import StreamedCheckpoint, stream
from ghostssm.checkpoint.tokenizer import load_tokenizer, required
from ghostssm.errors import InputError, ModelError
from ghostssm.evaluation import copying, perplexity
from ghostssm.evaluation.perplexity import Evaluation, measurement_of
from ghostssm.evaluation.recall import Recall, last_words
from ghostssm.extras import needs_installed
from ghostssm.ops.state_format import FLOAT32, FLOAT32_STORAGE, StateStorage
from ghostssm.plan.measurement import Difference, Measurement
from ghostssm.progress import Notify, Progress, silent, stage, unheard
from ghostssm.text.sources import read_passages
from ghostssm.text.windows import Windows
from ghostssm.values import short
from ghostssm.workflows.inputs import tell_idle_gpu, windows_of
from ghostssm.workflows.request_checks import check_places, check_request
from ghostssm.workflows.requests import EvaluateRequest

if TYPE_CHECKING:
    from ghostssm.workflows.harness import Score

_HARNESS_BATCH = 8


@dataclass(frozen=True)
class TextLoss:
    """The loss of one model on windows of text."""

    windows: Windows
    evaluation: Evaluation

    def as_json(self) -> dict[str, Any]:
        numbers = ("loss", "standard_error", "perplexity", "bits_per_byte")
        return {
            "text": self.windows.text_name,
            "window_length": self.windows.length,
            **{name: getattr(self.evaluation, name) for name in numbers},
            "window_losses": self.evaluation.losses.tolist(),
        }


@dataclass(frozen=True)
class ExcessLoss:
    """The losses of a model and of its base on the same windows."""

    windows: Windows
    dense: Evaluation
    pruned: Evaluation

    @property
    def measured(self) -> Measurement:
        return measurement_of(self.windows, self.dense, self.pruned)

    def as_json(self) -> dict[str, Any]:
        return {
            **self.measured.as_json(),
            "dense_perplexity": self.dense.perplexity,
            "pruned_perplexity": self.pruned.perplexity,
            "dense_window_losses": self.dense.losses.tolist(),
            "pruned_window_losses": self.pruned.losses.tolist(),
        }


@dataclass(frozen=True)
class LastWords:
    """How well the last words of a text's passages are named."""

    text: str
    recall: Recall

    @property
    def passages(self) -> int:
        return len(self.recall.losses)

    def as_json(self) -> dict[str, Any]:
        recall = self.recall
        return {"text": self.text, "passages": self.passages, "loss": recall.loss, "accuracy": recall.accuracy}


@dataclass(frozen=True)
class Copied:
    """The loss at copied tokens and elsewhere, and that of the control, which sees no occurrence that it copies."""

    windows: Windows
    losses: copying.Copying
    control: copying.Copying

    @property
    def gains(self) -> dict[str, Difference]:
        """How much less the model loses than the control, which sees less: at ``copied`` tokens and ``elsewhere``."""
        parts = ("copied", "elsewhere")
        return {part: getattr(self.control, part).excess_over(getattr(self.losses, part)) for part in parts}

    def as_json(self) -> dict[str, Any]:
        text = {"text": self.windows.text_name, "window_length": self.windows.length}
        return text | {
            "context": copying.CONTEXT,
            "distance": copying.DISTANCE,
            **{
                part: {
                    "tokens": int(getattr(self.losses, part).counts.sum()),
                    "loss": getattr(self.losses, part).mean,
                    "gain": gain.mean,
                    "gain_standard_error": gain.standard_error,
                }
                for part, gain in self.gains.items()
            },
        }


@dataclass(frozen=True)
class TaskScores:
    """The scores that the harness gives."""

    scores: tuple[Score, ...]

    def as_json(self) -> list[dict[str, Any]]:
        return [asdict(score) for score in self.scores]


EvaluateOutcome = TextLoss | ExcessLoss | LastWords | Copied | TaskScores


def evaluate(request: EvaluateRequest, *, progress: Progress = silent, notify: Notify = unheard) -> EvaluateOutcome:
    """Carry a request out: what ``ghostssm evaluate`` does, in one call. Losses are measured in float32.

    Args:
        progress: told how far the work is. notify: told what a person should know, in sentences.

    Raises:
        InputError: a fault of the request or of what it names, found before anything is loaded where it can be.
        NumericalError: a loss that is not finite.
    """
    check_request(request)
    check_places(request)
    if request.state_dtype is not None:
        StateStorage.of(request.state_dtype)  # raises for what no model can have
    check_device(request.device)
    if request.tasks:
        return _scored(request)
    tell_idle_gpu(notify, request.device)
    if request.last_words is not None:
        passages = read_passages(request.last_words)[: request.limit]
        checkpoint = _loaded(request, request.model)
        recall = last_words(checkpoint.model, checkpoint.require_tokenizer(), passages, progress)
        return LastWords(request.last_words, recall)
    if request.copying:
        checkpoint = _loaded(request, request.model)
        windows = windows_of(request, request.text, checkpoint.require_tokenizer())
        whole = copying.copying(checkpoint.model, windows, progress=progress)
        return Copied(windows, whole, copying.copying_in_reach(checkpoint.model, windows, progress=progress))
    if request.against is None:
        opened = _opened(request, request.model)
        windows = windows_of(request, request.text, opened.require_tokenizer())
        storage = _storage(request, opened.source, notify)
        return TextLoss(windows, _evaluation(request, opened, windows, progress, storage))
    windows = _shared_windows(request, request.model, request.against)
    _tell_other_base(request.model, request.against, notify)
    notify(f"measuring {request.model}")
    opened = _opened(request, request.model)
    pruned = _evaluation(request, opened, windows, progress, _storage(request, opened.source, notify))
    del opened  # one model is in memory at a time
    notify(f"measuring {request.against}")
    dense = _evaluation(request, _opened(request, request.against), windows, progress, FLOAT32_STORAGE)
    return ExcessLoss(windows, dense, pruned)


def _tell_other_base(model: str, base: str, notify: Notify) -> None:
    """Tell that a model was pruned from others than the base's files, if its manifest's hash of them says so."""
    try:
        manifest = Manifest.read(find_source(model, weights=False).folder)
    except ModelError:  # no manifest, or a broken one: reading it elsewhere tells
        return
    source = find_source(base)
    if manifest.state_size is None or manifest.base_model_sha256 is None or source.hub_id == manifest.base_model:
        return
    with stage(f"comparing {base} with what the manifest of {model} says"):
        if source.fingerprint() != manifest.base_model_sha256:
            notify(
                f"note: {model} was pruned from {short(manifest.base_model)}, and {base} has other weights or another "
                f"config.json than that had; the excess loss is over {base}"
            )


def _storage(request: EvaluateRequest, source: Source, notify: Notify) -> StateStorage:
    """How a model's state is kept; a dtype that only its checkpoint names is told."""
    chosen = chosen_state_dtype(source)
    if request.state_dtype is None and chosen != FLOAT32.name:
        notify(f"the state is kept in {chosen}, for which the checkpoint was made; --state-dtype takes another")
    return StateStorage.of(request.state_dtype or chosen, request.state_rounding)


def _loaded(request: EvaluateRequest, model: str) -> Checkpoint:
    return load(model, dtype=torch.float32, device=request.device, tokenizer=request.tokenizer)


def _opened(request: EvaluateRequest, model: str) -> Checkpoint | StreamedCheckpoint:
    """The model in memory, or streamed."""
    if not request.stream:
        return _loaded(request, model)
    return stream(model, dtype=torch.float32, device=request.device, tokenizer=request.tokenizer)


def _evaluation(
    request: EvaluateRequest,
    opened: Checkpoint | StreamedCheckpoint,
    windows: Windows,
    progress: Progress,
    storage: StateStorage,
) -> Evaluation:
    measured = opened.model if isinstance(opened, Checkpoint) else opened.blocks
    return perplexity.evaluate(measured, windows, progress, Scratch(request.offload), storage)


def _shared_windows(request: EvaluateRequest, model: str, base: str) -> Windows:
    """The windows of both models; from their configs and tokenizers only, so that a mismatch shows before the work.

    Raises:
        InputError: the models differ in their vocabulary, or their tokenizers make other tokens of the text.
    """
    cut, sizes = [], []
    for spec in (model, base):
        source = find_source(spec, weights=False)
        config = model_config(source)
        sizes.append(config.vocab_size)
        vocabulary = required(load_tokenizer(source, config, request.tokenizer), source)
        cut.append(windows_of(request, request.text, vocabulary))
    if sizes[0] != sizes[1]:
        raise InputError(
            f"{model} has a vocabulary of {sizes[0]} tokens, {base} one of {sizes[1]}; expected the model that "
            f"{model} was pruned from after --against."
        )
    if not torch.equal(cut[0].ids, cut[1].ids):
        raise InputError(
            f"The tokenizers of {model} and {base} make different tokens of {cut[0].text_name}, so that their losses "
            "can't be compared; name the tokenizer that both were trained with by --tokenizer."
        )
    return cut[0]


def _scored(request: EvaluateRequest) -> TaskScores:
    find_source(request.model, weights=False)  # before the data of every task is fetched
    try:
        from ghostssm.workflows import harness
    except ModuleNotFoundError as error:
        raise InputError(f"--tasks {needs_installed(str(error.name))}") from None
    names = [name for value in request.tasks for name in value.split(",") if name]
    tasks = harness.load_tasks(names, request.include_path)
    model = harness.GhostLM(
        request.model,
        request.tokenizer,
        device=request.device,
        batch_size=_HARNESS_BATCH,
        max_length=request.window_length,
    )
    return TaskScores(tuple(harness.run_tasks(model, tasks, request.limit)))
