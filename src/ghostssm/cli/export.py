"""``ghostssm export``: a checkpoint as another engine reads it."""

from __future__ import annotations

from ghostssm.cli.console import print_facts, print_json
from ghostssm.cli.parsing import AsJson, asks_for
from ghostssm.report.screen import note
from ghostssm.units import bytes_text
from ghostssm.workflows.requests import ExportRequest


@asks_for(ExportRequest)
def export(request: ExportRequest, as_json: AsJson = False) -> None:
    """Write a model for another engine: GGUF for llama.cpp, or the other checkpoint dialect.

    ghostssm export mamba2-130m-n64 --dtype q8_0 --output mamba2-130m-n64.gguf
    ghostssm export mamba2-130m-n64 --format mamba_ssm --output for-mamba-ssm
    """
    from ghostssm.workflows.export import export as use_case

    outcome = use_case(request)
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
