"""What is wrong with a request that shows without PyTorch, so that a command is refused in the time of its help.

The command checks a request before it imports PyTorch; every use case checks it again, for calls from Python.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from fractions import Fraction
from functools import singledispatch

from ghostssm.checkpoint.place import folder_of
from ghostssm.choices import check_divisible, check_searchable, processes_started
from ghostssm.errors import InputError
from ghostssm.extras import check_installed
from ghostssm.files.outputs import OutputFile, OutputFolder, check_apart
from ghostssm.text.sources import check_streamable, check_text, text_title
from ghostssm.units import memory_bytes
from ghostssm.workflows.options import flag, options_of
from ghostssm.workflows.requests import (
    BenchRequest,
    CompareRequest,
    DistillRequest,
    EvaluateRequest,
    ExportRequest,
    InspectRequest,
    PruneRequest,
    ReproduceRequest,
    Request,
)

AMOUNTS = ("state_size", "budget", "max_excess_loss", "state_bytes")
"""Fields of a pruning request, of which one says how much of the state to keep."""
_PRUNE_BELONGS_TO = {
    **dict.fromkeys(("text_windows", "baselines"), ("evaluate",)),
    "batches": ("report",),
    "private": ("push_to_hub",),
    "offload": ("stream",),
    "resume": ("stream",),
    **dict.fromkeys(("untie", "report", "push_to_hub", "stream", "overwrite"), ("output",)),
}
_EVALUATE_BELONGS_TO = {"include_path": ("tasks",), "limit": ("tasks", "last_words"), "offload": ("stream",)}
"""Options that have no effect without another one."""


def check_request(request: object) -> None:
    """Check the values of a request's options one by one, and beside one another.

    Raises:
        InputError: one is out of bounds, has no effect, contradicts another, or is missing.
    """
    for each in options_of(type(request)):  # type: ignore[arg-type]
        each.check(getattr(request, each.name))
    _check_together(request)


def check_places(request: object) -> None:
    """Check what a request names on this machine: models, texts, and what is to be written.

    Raises:
        InputError: something is not there, or may not be replaced.
    """
    _check_places(request)


@singledispatch
def _check_together(request: object) -> None:
    """The options of a request beside one another."""


@_check_together.register
def _(request: PruneRequest) -> None:
    check_belonging(request, _PRUNE_BELONGS_TO)
    check_heeded(request, "state_bytes", "state_dtype")
    flags = {name: flag(PruneRequest, name) for name in AMOUNTS}
    given = [flags[name] for name in AMOUNTS if getattr(request, name) is not None]
    if not given:
        raise InputError(f"Say how much to keep: give one of {', '.join(flags.values())}.")
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} each say how much to keep; give one of them.")
    if request.budget is not None and not 0 < request.budget <= 1:
        raise InputError(f"--budget is {request.budget:g}; expected a share of the state above 0, up to 1.")
    if request.state_bytes is not None:
        share_or_bytes(request.state_bytes)
    searched = request.max_excess_loss is not None or request.state_bytes is not None
    if request.multiple is not None and not (searched or "per-layer" in request.recipe.split("+")):
        raise InputError(
            "--multiple works with --per-layer, --max-excess-loss or --state-bytes only; leave out --multiple."
        )
    if searched:
        check_searchable(request.windows)
    if request.stream:
        _check_streamed(request, given[0] if searched else None)
    elif _several_processes():
        raise InputError("Several processes share a run with --stream only; add that, or start one process.")


def _check_streamed(request: PruneRequest, search: str | None) -> None:
    """Raise InputError for what needs the whole model at once."""
    if request.batches is not None:
        raise InputError(
            "--batch decodes with the whole model, which --stream never has; leave it out, and see ghostssm bench."
        )
    if request.baselines:
        raise InputError(
            "--baselines prunes the whole model several times, which --stream can't; leave it out, and see ghostssm "
            "compare."
        )
    if request.report and _several_processes():
        raise InputError("--report looks at the unpruned model in one process; leave it out, or start one process.")
    if search is not None:
        raise InputError(
            f"{search} tries several sizes on the whole model, which --stream can't; give --state-size or --budget."
        )


@_check_together.register
def _(request: CompareRequest) -> None:
    if not (request.state_sizes or request.state_bytes):
        raise InputError("Say how much to keep: give --state-size or --state-bytes.")
    check_belonging(request, {"engines": ("state_bytes",)})
    if request.state_bytes:
        check_heeded(request, "state_bytes", "state_sizes", "state_dtypes", "state_rounding")
        check_searchable(request.windows)
    for bound in request.state_bytes:
        share_or_bytes(bound)
    check_rounding(request.state_rounding, request.state_dtypes)


@_check_together.register
def _(request: EvaluateRequest) -> None:
    instead = (request.last_words is not None, request.copying, bool(request.tasks))
    if sum(instead) > 1:
        raise InputError("Give at most one of --last-words, --copying and --tasks.")
    check_belonging(request, _EVALUATE_BELONGS_TO)
    state = ("state_dtype", "state_rounding")
    check_heeded(request, "tasks", "text", "text_windows", "against", *state)
    check_heeded(request, "last_words", "text", "text_windows", "window_length", "against", *state)
    check_heeded(request, "copying", "against", *state)
    if request.tasks:
        check_installed("--tasks", "lm-eval")
    if request.stream and any(instead):
        raise InputError("--last-words, --copying and --tasks need the whole model in memory; leave out --stream.")
    if request.state_dtype is not None:  # else the checkpoint may say one
        check_rounding(request.state_rounding, (request.state_dtype,))


@_check_together.register
def _(request: BenchRequest) -> None:
    check_rounding(request.state_rounding, request.state_dtypes)


def check_rounding(rounding: str, dtypes: Sequence[str]) -> None:
    """Raise InputError for stochastic rounding of nothing but float32."""
    if rounding == "stochastic" and set(dtypes) <= {"float32"}:
        raise InputError(
            "A float32 state is not rounded; give a narrower --state-dtype with --state-rounding stochastic."
        )


@_check_together.register
def _(request: InspectRequest) -> None:
    if request.context is not None and not request.memories:
        raise InputError("--context counts with --memory only; add the memory of a GPU, such as --memory 80GiB.")
    for size in request.memories:
        memory_bytes(size)
    for bound in request.state_bytes:
        share_or_bytes(bound)


@_check_together.register
def _(request: DistillRequest) -> None:
    titles = {text_title(text, "evaluation") for text in request.evaluate}
    if (title := text_title(request.text, "calibration")) in titles:
        raise InputError(f"{title} is to be trained on and to be measured on; name other text with --evaluate.")
    if request.student == request.teacher:
        raise InputError(
            f"Student and teacher are both {request.student}; expected a pruned checkpoint, and with --teacher the "
            "model that it was pruned from."
        )
    check_divisible(request.batch, request.accumulate, processes_started())
    if request.learning_rate is not None and not request.learning_rate > 0:
        raise InputError(f"--learning-rate is {request.learning_rate:g}; expected a number above 0, such as 0.0005.")
    if request.teacher_device is not None and _several_processes():
        raise InputError("Several processes shard the teacher as they do the student; leave out --teacher-device.")
    if request.log_to is not None:
        check_installed(f"--log-to {request.log_to}", "accelerate", request.log_to)


@_check_together.register
def _(request: ExportRequest) -> None:
    if request.format == "gguf":
        check_installed("A GGUF file", "gguf")
    if request.dtype == "q8_0" and request.format != "gguf":
        raise InputError(f"--dtype q8_0 is a number format of GGUF; expected f32, f16 or bf16 for {request.format}.")
    if request.untie and request.format == "gguf":
        raise InputError("--untie is for --format transformers; llama.cpp knows tied heads, so leave it out for GGUF.")


@singledispatch
def _check_places(request: object) -> None:
    """What a request names on this machine."""


@_check_places.register
def _(request: PruneRequest) -> None:
    if request.output is not None:
        check_apart(request.output, request.model)
        if not request.stream:  # such a run looks at its folder itself: it may go on there
            OutputFolder(request.output, request.overwrite)
    folder_of(request.model)
    _check_texts(request.calibration, request.evaluate)


@_check_places.register
def _(request: CompareRequest) -> None:
    folder_of(request.model)
    _check_texts(request.calibration, request.text)


@_check_places.register
def _(request: EvaluateRequest) -> None:
    folder_of(request.model)
    if request.against is not None:
        folder_of(request.against)
    if not request.tasks:
        _check_texts(request.text if request.last_words is None else request.last_words)


@_check_places.register
def _(request: BenchRequest | InspectRequest) -> None:
    folder_of(request.model)


@_check_places.register
def _(request: DistillRequest) -> None:
    for model in (request.student, request.teacher):
        check_apart(request.output, model)
        folder_of(model)
    check_streamable(request.text)
    _check_texts(*request.evaluate)


@_check_places.register
def _(request: ExportRequest) -> None:
    check_apart(request.output, request.model)
    kind = OutputFile if request.format == "gguf" else OutputFolder
    kind(request.output, request.overwrite)
    folder_of(request.model)


@_check_places.register
def _(request: ReproduceRequest) -> None:
    _check_texts(request.calibration, request.text)


def _check_texts(*names: str | None) -> None:
    for name in names:
        if name is not None:
            check_text(name)


def _several_processes() -> bool:
    return processes_started() > 1


def share_or_bytes(text: str) -> Fraction | int:
    """What ``--state-bytes`` says: a share of the dense float32 state, such as ``1/8``, or bytes, such as ``6MiB``.

    Raises:
        InputError: it is neither, or no share between 0 and 1.
    """
    try:
        share = Fraction(text)
    except ZeroDivisionError:
        share = Fraction(0)
    except ValueError:
        with suppress(InputError):  # what is neither is told of below
            return memory_bytes(text)
        share = Fraction(0)
    if not 0 < share < 1:
        raise InputError(
            f"--state-bytes is {text!r}; expected a share of the dense float32 state above 0 and below 1, such as 1/8, "
            "or a size with its unit, such as 6MiB."
        )
    return share


def check_belonging(request: Request, owners: Mapping[str, tuple[str, ...]]) -> None:
    """Raise InputError for an option without any of its ``owners``, the options that it works with."""
    for name, others in owners.items():
        if request.differs(name) and not any(getattr(request, other) for other in others):
            mine, needed = flag(type(request), name), " or ".join(flag(type(request), other) for other in others)
            raise InputError(f"{mine} works with {needed} only; add that, or leave out {mine}.")


def check_heeded(request: Request, owner: str, *names: str) -> None:
    """Raise InputError for options that have no effect because ``owner`` is given too."""
    for name in names:
        if getattr(request, owner) and request.differs(name):
            mine, other = flag(type(request), name), flag(type(request), owner)
            raise InputError(f"{mine} has no effect with {other}; leave out one of the two.")
