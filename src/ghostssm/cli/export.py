"""``ghostssm export``: a checkpoint as another engine reads it."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from ghostssm.cli import arguments
from ghostssm.cli.console import bytes_text, note, print_facts, print_json
from ghostssm.cli.requesting import requested


def export(
    model: arguments.Model,
    output: Annotated[str, typer.Option("--output", metavar="PATH", help="One file for gguf, else a folder.")],
    format: Annotated[
        Literal["gguf", "transformers", "mamba_ssm"],
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
    given = locals()
    from ghostssm.workflows.export import ExportRequest
    from ghostssm.workflows.export import export as carry_out

    outcome = carry_out(requested(ExportRequest, given))
    if as_json:
        print_json(outcome.as_json())
        return
    for text in (*outcome.notes, *outcome.left_out.notes):
        note(f"note: {text}")
    print_facts(
        [
            ("written", f"{outcome.output} ({bytes_text(outcome.bytes)})"),
            ("format", f"{outcome.format}, {outcome.dtype}"),
            ("state size", " ".join(map(str, outcome.state_sizes))),
        ]
    )
