"""``ghostssm export``: a checkpoint as another engine reads it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ghostssm.cli import arguments
from ghostssm.cli.console import bytes_text, note, print_facts, print_json

if TYPE_CHECKING:
    from ghostssm import Checkpoint
    from ghostssm.checkpoint.left_out import LeftOut

Format = Literal["gguf", "transformers", "mamba_ssm"]


def export(
    model: arguments.Model,
    output: Annotated[str, typer.Option("--output", metavar="PATH", help="One file for gguf, else a folder.")],
    format: Annotated[
        Format,
        typer.Option(
            "--format", help="gguf: a file for llama.cpp. transformers, mamba_ssm: a checkpoint folder.", metavar="NAME"
        ),
    ] = "gguf",
    dtype: Annotated[
        Literal["f32", "f16", "bf16", "q8_0"] | None,
        typer.Option(
            "--dtype",
            help="Number format of the large matrices: f32, f16, bf16, or q8_0 for gguf. If not given: as they are.",
            metavar="NAME",
        ),
    ] = None,
    pad_to: Annotated[
        int | None,
        typer.Option(
            "--pad-to",
            metavar="SIZE",
            callback=arguments.at_least(1),
            help="Enlarge the state to this size with zeros, for an engine that needs it. Answers stay the same.",
        ),
    ] = None,
    untie: Annotated[
        bool,
        typer.Option(
            "--untie",
            help="Store the output head as a weight of its own even if it equals the embeddings; SGLang needs that.",
        ),
    ] = False,
    tokenizer: arguments.Tokenizer = None,
    no_tokenizer: Annotated[
        bool,
        typer.Option("--no-tokenizer", help="Write no tokenizer.", rich_help_panel=arguments.OTHER_PANEL),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what is there.", rich_help_panel=arguments.OTHER_PANEL)
    ] = False,
    as_json: arguments.AsJson = False,
) -> None:
    """Write a model for another engine: GGUF for llama.cpp, or the other checkpoint dialect.

    ghostssm export mamba2-130m-n64 --dtype q8_0 --output mamba2-130m-n64.gguf
    ghostssm export mamba2-130m-n64 --format mamba_ssm --output for-mamba-ssm
    """
    import torch

    import ghostssm
    from ghostssm.checkpoint.left_out import left_out
    from ghostssm.checkpoint.tokenizer import renamed_class
    from ghostssm.errors import InputError
    from ghostssm.files.output_file import OutputFile
    from ghostssm.files.output_folder import check_apart

    if dtype == "q8_0" and format != "gguf":
        raise InputError(f"--dtype q8_0 is a number format of GGUF; expected f32, f16 or bf16 for {format}.")
    if untie and format == "gguf":
        raise InputError("--untie is for --format transformers; llama.cpp knows tied heads, so leave it out for GGUF.")
    check_apart(output, model)
    place = OutputFile(output, overwrite) if format == "gguf" else ghostssm.OutputFolder(output, overwrite)
    dtypes = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
    wanted = None if dtype is None or format == "gguf" else dtypes[dtype]
    checkpoint = ghostssm.load(model, dtype=wanted, tokenizer=tokenizer)
    if pad_to is not None:
        padded = ghostssm.pad_state(checkpoint.model, pad_to)
        checkpoint = ghostssm.Checkpoint(padded, checkpoint.tokenizer, checkpoint.source)
    if isinstance(place, OutputFile):
        written = ghostssm.export_gguf(checkpoint, place, dtype=dtype, with_tokenizer=not no_tokenizer)
        _report(written.path, format, written.dtype, checkpoint, written.left_out, written.notes, as_json)
    else:
        assert format != "gguf"
        path = ghostssm.export_checkpoint(
            checkpoint, place, dialect=format, untie=untie, with_tokenizer=not no_tokenizer
        )
        stored = str(checkpoint.model.dtype).removeprefix("torch.")
        missing = left_out(checkpoint.source, checkpoint.model, path)
        renamed = None if no_tokenizer else renamed_class(checkpoint.tokenizer, path)
        _report(path, format, stored, checkpoint, missing, () if renamed is None else (renamed,), as_json)


def _report(
    path: Path,
    format: Format,
    stored: str,
    checkpoint: Checkpoint,
    missing: LeftOut,
    notes: tuple[str, ...],
    as_json: bool,
) -> None:
    from ghostssm.models.families import mixers_of

    sizes = sorted({mixer.layout.state_size for mixer in mixers_of(checkpoint.model)})
    size = path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in path.iterdir())
    if as_json:
        facts = {"output": str(path), "format": format, "dtype": stored, "state_sizes": sizes, "bytes": size}
        print_json(facts | {"notes": notes, "left_out": missing.as_json()})
        return
    for text in (*notes, *missing.notes):
        note(f"note: {text}")
    print_facts(
        [
            ("written", f"{path} ({bytes_text(size)})"),
            ("format", f"{format}, {stored}"),
            ("state size", " ".join(map(str, sizes))),
        ]
    )
