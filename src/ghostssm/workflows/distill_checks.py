"""Every check of a distillation that needs no weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from ghostssm.checkpoint.description import Description, describe
from ghostssm.checkpoint.loading import empty_model
from ghostssm.choices import Trained
from ghostssm.errors import InputError
from ghostssm.ops.state_format import FLOAT32
from ghostssm.recovery.base import training_dtype
from ghostssm.recovery.distill.pair import choose_trained
from ghostssm.recovery.distill.training import Settings
from ghostssm.units import bytes_text
from ghostssm.workflows.request_checks import check_places, check_request
from ghostssm.workflows.requests import DistillRequest

_TRIED_TEXT = "The state's 3rd channel — déjà vu?\n\tif x[i] != 0x1F: return None  # 12,345.6\n" * 2


def settings(request: DistillRequest) -> Settings:
    """How the student is trained; refuses numbers out of range."""
    values = {name: getattr(request, name) for name in Settings.__dataclass_fields__}
    return Settings(**values | {"state_dtype": request.state_dtype or FLOAT32.name})


def rounded_to(request: DistillRequest, student: Description) -> str:
    """The dtype that the student's state is rounded to in training."""
    kept_in = None if student.pruning is None else student.pruning.state_dtype
    return request.state_dtype or training_dtype(kept_in)


def checked(request: DistillRequest) -> tuple[Description, Description]:
    """Check a request before anything is loaded; describes student and teacher.

    Raises:
        InputError: a fault of the request, or of what it names; says what was found and what was expected.
    """
    check_request(request)
    check_places(request)
    settings(request)
    student, teacher = describe(request.student), describe(request.teacher)
    _check_pair(student, teacher)
    return student, teacher


def _check_pair(student: Description, teacher: Description) -> None:
    """Raise InputError, with all differences, unless a student can have been pruned from a teacher."""

    def family(described: Description) -> str:
        return described.family.removeprefix("ghost_")

    pairs = {
        "family": (family(student), family(teacher)),
        "vocabulary": (student.vocab_size, teacher.vocab_size),
        "layers": (student.layers, teacher.layers),
        "hidden size": (student.layout.hidden_size, teacher.layout.hidden_size),
        "heads": (student.layout.num_heads, teacher.layout.num_heads),
    }
    differ = [f"{what} {own!r} and {other!r}" for what, (own, other) in pairs.items() if own != other]
    if differ:
        raise InputError(
            f"The student {student.name} and the teacher {teacher.name} don't fit: {', '.join(differ)}; expected the "
            "model that the student was pruned from."
        )


def check_tokenizers(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase | None) -> None:
    """Raise InputError if two tokenizers cut a text into other tokens."""
    if teacher is not None and (
        student.get_vocab() != teacher.get_vocab()
        or student(_TRIED_TEXT)["input_ids"] != teacher(_TRIED_TEXT)["input_ids"]
    ):
        raise InputError(
            "Student and teacher have tokenizers that differ, so that they would read other text; expected the model "
            "that the student was pruned from, or its tokenizer, --tokenizer."
        )


def check_room(request: DistillRequest, student: Description, teacher: Description, processes: int) -> None:
    """Raise InputError unless the device has room for weights, gradients and Adam's moments; it says what takes less.

    Activations are not counted; whether they fit shows in the first step.
    """
    device = torch.device(request.device)
    free = _free_bytes(device)
    if free is None:
        return
    needed = {kind: _needed_bytes(request, student, teacher, kind) for kind in ("all", "mixers", "small")}
    if device.type != "cpu":
        needed = {kind: count // processes for kind, count in needed.items()}
    if needed[request.trained] <= free:
        return
    ways = [
        f"--train {kind} ({bytes_text(count)})" for kind, count in needed.items() if count < needed[request.trained]
    ]
    ways += ["--bfloat16 (the teacher in half the memory)"] * (not request.bfloat16)
    ways += ["--teacher-device"] * (request.teacher_device is None) + ["more processes on more GPUs (torchrun)"]
    raise InputError(
        f"Weights, gradients, Adam's moments and the teacher take {bytes_text(needed[request.trained])}, and "
        f"{device} has {bytes_text(free)} free. What lowers it: {', '.join(ways)}."
    )


def _needed_bytes(request: DistillRequest, student: Description, teacher: Description, trained: Trained) -> int:
    """Bytes of float32 weights; of gradient, two moments and best value of those that move; of the teacher."""
    moving = parameters_that_move(student, trained)
    same = request.teacher_device in (None, request.device)
    return 4 * student.parameters + 16 * moving + (2 if request.bfloat16 else 4) * teacher.parameters * same


def parameters_that_move(student: Description, trained: Trained) -> int:
    """How many parameters are trained."""
    model = empty_model(student.config)
    choose_trained(model, trained)
    return sum(value.numel() for value in model.parameters() if value.requires_grad)


def _free_bytes(device: torch.device) -> int | None:
    """Free bytes of a device's memory; None where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    counts: Mapping[str, str] = dict(line.split(":", 1) for line in lines)
    return 1024 * int(counts["MemAvailable"].split()[0]) if "MemAvailable" in counts else None
