"""Write a model as another engine reads it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ghostssm.checkpoint.exporting import export_checkpoint
from ghostssm.checkpoint.gguf import export_gguf
from ghostssm.checkpoint.left_out import LeftOut, left_out
from ghostssm.checkpoint.loading import load
from ghostssm.checkpoint.tokenizer import renamed_class
from ghostssm.files.outputs import OutputFile, OutputFolder
from ghostssm.models.families import mixers_of
from ghostssm.plan.surgery import pad_state
from ghostssm.workflows.request_checks import check_places, check_request
from ghostssm.workflows.requests import ExportRequest

_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class ExportOutcome:
    """What was written.

    Attributes:
        output: where it is.
        format: ``gguf``, or the dialect.
        dtype: that it is stored in.
        state_sizes: that there are, ascending.
        bytes: of all files.
        notes: what a person should know.
        left_out: what the output has no place for.
    """

    output: Path
    format: str
    dtype: str
    state_sizes: tuple[int, ...]
    bytes: int
    notes: tuple[str, ...]
    left_out: LeftOut

    def as_json(self) -> dict[str, Any]:
        return vars(self) | {"output": str(self.output), "left_out": self.left_out.as_json()}


def export(request: ExportRequest) -> ExportOutcome:
    """Carry a request out: what ``ghostssm export`` does, in one call.

    Args:
        request: the model, the output and its format.

    Raises:
        InputError: a fault of the request or of what it names, found before anything is loaded where it can be.
        StorageError: writing failed; nothing half-written is left.
    """
    check_request(request)
    check_places(request)
    place = (OutputFile if request.format == "gguf" else OutputFolder)(request.output, request.overwrite)
    dtype = None if isinstance(place, OutputFile) or request.dtype is None else _DTYPES[request.dtype]
    checkpoint = load(request.model, dtype=dtype, tokenizer=request.tokenizer)
    if request.pad_to is not None:
        checkpoint = replace(checkpoint, model=pad_state(checkpoint.model, request.pad_to))
    with_tokenizer = not request.no_tokenizer
    if isinstance(place, OutputFile):
        written = export_gguf(checkpoint, place, dtype=request.dtype, with_tokenizer=with_tokenizer)
        path, notes, missing = written.path, written.notes, written.left_out
        stored: str = written.dtype
        size = path.stat().st_size
    else:
        assert request.format != "gguf"
        path = export_checkpoint(
            checkpoint, place, dialect=request.format, untie=request.untie, with_tokenizer=with_tokenizer
        )
        stored = str(checkpoint.model.dtype).removeprefix("torch.")
        missing = left_out(checkpoint.source, checkpoint.model, path)
        renamed = renamed_class(checkpoint.tokenizer, path) if with_tokenizer else None
        notes = () if renamed is None else (renamed,)
        size = sum(file.stat().st_size for file in path.iterdir())
    sizes = sorted({mixer.layout.state_size for mixer in mixers_of(checkpoint.model)})
    return ExportOutcome(path, request.format, stored, tuple(sizes), size, notes, missing)
